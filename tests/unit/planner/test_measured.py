"""Speeds measured on a run: its plan over its metrics."""

from __future__ import annotations

import pytest

from gspo_dist.planner.measured import speeds
from gspo_dist.planner.throughput import StepTime

PLANNED = StepTime(collect_s=100.0, logprobs_s=10.0, train_s=40.0, sync_s=5.0, tokens=1e6, gpus=32)


def rows(*update_s, collect_s=200.0):
    return [{"time/update_s": u, "time/old_logprobs_s": 20.0, "time/collect_s": collect_s} for u in update_s]


def test_speeds_are_planned_over_measured_seconds_without_the_first_steps() -> None:
    found = speeds(rows(900, 900, 70, 80, 90), PLANNED, 0)
    assert found.learner == pytest.approx(50 / 100)
    assert found.engine == pytest.approx(100 / 200)
    assert found.steps == 3


def test_engines_that_overlap_are_not_measured() -> None:
    assert speeds(rows(1, 1, 30), PLANNED, 1).engine is None


def test_a_run_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="a run of more than 2 steps"):
        speeds(rows(1, 1), PLANNED, 0)
    with pytest.raises(ValueError, match="let it run"):
        speeds([{}, {}, {}, {"time/collect_s": 3.0}], PLANNED, 0)
