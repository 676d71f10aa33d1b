"""Settings of megatron's optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron.optimizer import optimizer_config


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
