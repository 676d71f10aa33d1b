"""The loss scale of float16: when it moves, and that nothing but the range of float16 notices it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspo_dist.config import LearnerConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.loss_scale import LEAST, WINDOW, LossScale

from .test_eager import batch, make, model, near, spec

__all__ = ["model"]  # the fixture


def test_it_halves_at_an_overflow_and_doubles_after_a_hundred_steps_without_one() -> None:
    scale = LossScale(8.0)
    seen = []
    for overflow in [False] * 99 + [True] + [False] * 99 + [False, False]:
        scale.update(overflow)
        seen.append(scale.value)
    assert WINDOW == 100
    assert seen[:99] == [8.0] * 99
    assert seen[99:199] == [4.0] * 100
    assert seen[199:] == [8.0, 8.0]
    for _ in range(9):
        scale.update(True)
    assert scale.value == LEAST == 1.0


def test_a_resume_goes_on_counting() -> None:
    scale, other = LossScale(8.0), LossScale(2.0)
    for _ in range(60):
        scale.update(False)
    other.load_state_dict(scale.state_dict())
    for one in (scale, other):
        for _ in range(40):
            one.update(False)
    assert (scale.value, other.value) == (16.0, 16.0)


def test_other_precisions_have_none() -> None:
    assert [LossScale.of(p, 4.0) for p in ("fp32", "bf16")] == [None, None]
    made = LossScale.of("fp16", 4.0)
    assert made is not None
    assert float(made.apply(torch.tensor(1.5))) == 6.0


@pytest.mark.parametrize("bad", [0.5, 3.0, 0.0, -2.0, float("inf"), float("nan")])
def test_a_scale_that_would_round_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="initial_loss_scale must be a power of two"):
        LearnerConfig(initial_loss_scale=bad)


def scaled(model: Path, initial: float) -> EagerLearner:
    learner = make(model, "fp16")
    assert learner.scale is not None
    assert learner.scale.value == 65536.0
    learner.scale.value = initial
    return learner


def gradient(learner: EagerLearner) -> torch.Tensor:
    """As the optimiser sees it after one batch: moment 1 of a first step over 1 - beta1."""
    learner.forward_backward([near(learner, batch((0, 1, 2)))], spec())
    step = learner.optim_step()
    assert not step.skipped
    return torch.cat([s["exp_avg"].flatten() for s in learner.optimizer.state.values()]) / 0.1


def test_the_gradient_does_not_depend_on_the_scale(model: Path) -> None:
    """Only what falls below float16's range does: with a small scale some gradients are lost."""
    a, b = gradient(scaled(model, 2.0**12)), gradient(scaled(model, 2.0**14))
    assert (a - b).norm() < 1e-4 * a.norm()
    tiny = gradient(scaled(model, 1.0))
    assert (tiny == 0).sum() > (a == 0).sum()


def test_it_is_nearer_to_float32_than_bfloat16_is(model: Path) -> None:
    """Three more bits of mantissa: eight times as near, where no route flips."""
    exact = gradient(make(model, "fp32"))
    half, brain = gradient(scaled(model, 2.0**14)), gradient(make(model, "bf16"))
    assert (half - exact).norm() < 0.01 * exact.norm()
    assert (half - exact).norm() < 0.4 * (brain - exact).norm()


def test_an_overflow_costs_its_step_and_what_follows_never_saw_it(model: Path, tmp_path: Path) -> None:
    """A backward pass that really overflows: float16 ends at 65,504."""
    learner, other = scaled(model, 2.0**40), scaled(model, 2.0**14)
    packed = near(learner, batch((0, 1, 2)))
    learner.forward_backward([packed], spec())
    step = learner.optim_step()
    assert (step.skipped, step.policy_version, step.loss_scale) == (True, 0, 2.0**40)
    assert learner.scale is not None
    assert learner.scale.value == 2.0**39
    learner.scale.value = 2.0**14
    for one in (learner, other):
        one.forward_backward([packed], spec())
        step = one.optim_step()
        assert (step.skipped, step.policy_version, step.loss_scale) == (False, 1, 2.0**14)
    for a, b in zip(learner.masters, other.masters, strict=True):
        assert torch.equal(a, b)
    learner.save(tmp_path)
    back = scaled(model, 2.0**3)
    back.load(tmp_path)
    assert back.scale is not None
    assert back.scale.state_dict() == learner.scale.state_dict() == {"value": 2.0**14, "clean": 1}
