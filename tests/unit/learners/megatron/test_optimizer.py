"""Settings of megatron's optimiser."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_dist.config import LearnerConfig, MegatronConfig, OptimizerConfig
from gspo_dist.learners.megatron import cpu_shim
from gspo_dist.learners.megatron.optimizer import clipped_step, optimizer_config


def test_offloaded_and_precision_aware_optimisers_keep_whole_master_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0.16.1 offloads masters, saves them and loads them on one path only, and there as fp32 only."""
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)

    def built(**knobs: object) -> Any:
        return optimizer_config(
            LearnerConfig(backend="megatron", precision="bf16", megatron=MegatronConfig(**knobs))
        )

    offloaded = built(optimizer_cpu_offload=True)
    assert offloaded.use_precision_aware_optimizer
    assert offloaded.exp_avg_dtype == torch.float32
    assert not offloaded.store_param_remainders
    assert not built().use_precision_aware_optimizer


class PlainOptimizer:
    """megatron's optimiser of two parameters in small: what `clipped_step` calls, in its order."""

    def __init__(self, gradients: list[float], clip_grad: float) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in gradients]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = torch.tensor([gradient])
        self.param_groups = [{"lr": 0.0}]
        self.config = SimpleNamespace(
            clip_grad=clip_grad, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False
        )
        self.stepped = False

    def prepare_grads(self) -> None: ...

    def get_grad_norm(self) -> float:
        return float(torch.stack([p.grad for p in self.parameters]).norm())

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return self.parameters

    def step_with_ready_grads(self) -> None:
        self.stepped = True
        for parameter in self.parameters:
            parameter.data -= self.param_groups[0]["lr"] * parameter.grad


@pytest.mark.parametrize(
    ("clip", "moved"), [(1.0, [-0.06, -0.08]), (10.0, [-0.3, -0.4]), (0.0, [-0.3, -0.4])]
)
def test_a_step_clips_by_the_norm_before_clipping(
    clip: float, moved: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients 3 and 4 have norm 5: clipped to 1 they are 0.6 and 0.8. A clip of 0 means none."""
    # As `cpu_shim.install` does for a learner's process.
    monkeypatch.setattr("megatron.core.optimizer.clip_grads.torch", cpu_shim._TorchOnCpu("torch"))
    monkeypatch.setattr(torch.Tensor, "type", lambda self: "torch.cuda.FloatTensor")
    optimizer = PlainOptimizer([3.0, 4.0], clip)
    assert clipped_step(optimizer, OptimizerConfig(), 0.1) == 5.0
    assert [p.item() for p in optimizer.parameters] == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_does_not_step(bad: float) -> None:
    optimizer = PlainOptimizer([3.0, bad], 1.0)
    assert not math.isfinite(clipped_step(optimizer, OptimizerConfig(), 0.1))
    assert not optimizer.stepped
