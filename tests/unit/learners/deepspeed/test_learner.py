"""What the DeepSpeed learner refuses before it makes a process group. What it computes: tests/parity."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.config import LearnerConfig, OptimizerConfig
from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner


def test_a_rank_outside_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must fit learner\.world_size 4: got 0 and 2"):
        DeepSpeedLearner(
            LearnerConfig(backend="deepspeed", world_size=4), tmp_path, total_steps=1, rank=0, world_size=2
        )


def test_zero_0_clips_a_large_gradient_by_its_norm_in_float64() -> None:
    """torch's own float32 norm of so many numbers is 5e-5 too small."""
    weight = torch.nn.Parameter(torch.zeros(2_560_000))
    gradient = torch.randn(2_560_000, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.clone()
    learner = SimpleNamespace(config=LearnerConfig(optimizer=OptimizerConfig(grad_clip=1.0)))
    DeepSpeedLearner._clip_plain(learner, SimpleNamespace(param_groups=[{"params": [weight]}]))
    norm = float(gradient.double().norm())
    assert float(learner._plain_norm) == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(weight.grad, gradient / norm, rtol=2e-6, atol=0)
