"""What the learner refuses before it makes process groups or replaces parts of torch.

What it computes is held by tests/parity: log-probs, steps, weights, routes and checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron.learner import MegatronLearner
from tests.unit.learners.megatron.qwen3 import QWEN3_30B


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, {}, r"does not know the architecture 'GPT2LMHeadModel'"),
        (
            {},
            {"world_size": 3, "tensor_parallel": 3},
            r"tensor_parallel must divide num_attention_heads: got 3",
        ),
        ({}, {"optimizer_cpu_offload": True}, r"optimizer_cpu_offload needs a GPU"),
        ({}, {}, r"model folder .* has no \*\.safetensors files; copy the folder again"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    change: dict, config: dict, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B | change))
    before = torch.cuda.Stream, torch.Tensor.cuda
    knobs = dict(config)
    learner = LearnerConfig(
        backend="megatron", world_size=knobs.pop("world_size", 1), megatron=MegatronConfig(**knobs)
    )
    with pytest.raises(ValueError, match=message):
        MegatronLearner(learner, tmp_path, total_steps=1)
    assert not dist.is_initialized()
    assert (torch.cuda.Stream, torch.Tensor.cuda) == before
