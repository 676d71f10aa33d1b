"""The learning-rate schedule against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from gspo_dist.config import OptimizerConfig
from gspo_dist.learners.schedule import lr_factor


def factors(total: int, steps: int, **config: object) -> list[float]:
    factor = lr_factor(OptimizerConfig(**config), total)
    return [factor(k) for k in range(steps)]


def test_the_worked_example() -> None:
    got = factors(6, 6, warmup_steps=2, schedule="linear", min_lr_ratio=0.0)
    assert got == [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up() -> None:
    got = factors(5, 8, warmup_steps=4, schedule="constant", min_lr_ratio=0.25)
    assert got == [1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 1, 1]


def test_linear_ends_on_the_least_share_and_stays_there() -> None:
    """From 1 to 1/5 over 4 steps: 1/5 less each step, and no less than 1/5 beyond the last."""
    got = factors(4, 7, schedule="linear", min_lr_ratio=0.2)
    assert got == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2], rel=1e-12)


def test_cosine_is_half_way_down_in_the_middle_and_flat_at_both_ends() -> None:
    got = factors(8, 9, schedule="cosine", min_lr_ratio=0.1)
    assert got[0] == 1.0
    assert got[2] == pytest.approx(0.1 + 0.9 * (0.5 + math.sqrt(0.125)), rel=1e-12)
    assert got[4] == pytest.approx(0.55, rel=1e-12)
    assert got[8] == pytest.approx(0.1, rel=1e-12)


def test_a_run_of_nothing_but_warm_up_does_not_divide_by_zero() -> None:
    assert factors(2, 3, warmup_steps=2, schedule="linear", min_lr_ratio=0.0) == [0.5, 1.0, 1.0]
    assert factors(2, 4, warmup_steps=2, schedule="linear", min_lr_ratio=0.0)[3] == 0.0
