"""Layouts and knobs are checked before anything starts, without torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout, check_transformer_engine
from gspo_dist.models.shape import ModelShape
from tests.unit.learners.megatron.qwen3 import QWEN3_30B


@pytest.fixture
def model() -> ModelShape:
    return from_hf(QWEN3_30B)


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (16, {"tensor_parallel": 4, "expert_parallel": 4}),
        (16, {"tensor_parallel": 2, "expert_parallel": 8}),
        (64, {"tensor_parallel": 4, "pipeline_parallel": 2, "context_parallel": 2, "expert_parallel": 8}),
        (8, {"tensor_parallel": 8, "expert_parallel": 8}),
        (32, {"pipeline_parallel": 4, "virtual_stages": 3, "expert_parallel": 8}),
    ],
)
def test_published_layouts_pass_and_factor_the_ranks(model: ModelShape, ranks: int, sizes: dict) -> None:
    layout = check_layout(MegatronConfig(**sizes), model, ranks)
    assert layout.data * layout.tensor * layout.context * layout.pipeline == ranks
    assert ranks % (layout.expert * layout.expert_tensor * layout.pipeline) == 0


@pytest.mark.parametrize(
    ("ranks", "sizes", "message"),
    [
        (
            8,
            {"expert_parallel": 4, "tensor_parallel": 2, "token_dispatcher": "allgather"},
            r"allgather cannot serve experts shared by .*expert_parallel 4 x .* above tensor_parallel 2 x",
        ),
        (
            8,
            {"token_dispatcher": "flex"},
            r"flex \(DeepEP\) sends tokens between expert ranks: got expert_parallel 1",
        ),
        (
            6,
            {"expert_parallel": 6},
            r"expert_parallel must divide num_experts: got 6 and 128; try 1, 2, 4, 8",
        ),
        (
            3,
            {"tensor_parallel": 3},
            r"tensor_parallel must divide num_attention_heads: got 3 and 32; try 1, 2, 4",
        ),
        (
            5,
            {"pipeline_parallel": 5},
            r"pipeline_parallel x virtual_stages must divide num_hidden_layers: got 5 and 48",
        ),
        (8, {"pipeline_parallel": 4, "virtual_stages": 5}, r"got 20 and 48; try 1, 2, 3, 4, 6"),
        (
            6,
            {"tensor_parallel": 4},
            r"context_parallel must divide learner.world_size: got 4 and 6; try 1, 2, 3, 6",
        ),
        (
            4,
            {"expert_parallel": 8},
            r"expert_parallel x pipeline_parallel must divide learner.world_size: got 8 and 4; try 1, 2, 4",
        ),
        (
            5,
            {"expert_tensor_parallel": 5},
            r"expert_tensor_parallel must divide moe_intermediate_size: got 5 and 768",
        ),
        (2, {"tensor_parallel": 2, "sequence_parallel": False}, r"sequence_parallel must be on"),
        (2, {"expert_bias": True, "aux_loss_coef": 0.01}, r"two ways to balance"),
        (2, {"pipeline_parallel": 2, "token_dispatcher": "allgather"}, r"use alltoall"),
    ],
)
def test_refusals_name_the_numbers(model: ModelShape, ranks: int, sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(MegatronConfig(**sizes), model, ranks)


def test_vocabulary_and_kv_heads_must_divide(model: ModelShape) -> None:
    with pytest.raises(ValueError, match=r"vocab_size: got 2 and 151937; try 1, "):
        check_layout(MegatronConfig(tensor_parallel=2), dataclasses.replace(model, vocab=151937), 2)
    with pytest.raises(ValueError, match=r"num_key_value_heads or be a multiple of it: got 2 and 3"):
        check_layout(MegatronConfig(tensor_parallel=2), dataclasses.replace(model, kv_heads=3), 2)


def test_shared_experts_must_divide(model: ModelShape) -> None:
    shared = dataclasses.replace(model, shared_ffn=5633)
    with pytest.raises(ValueError, match=r"shared_expert_intermediate_size: got 2 and 5633"):
        check_layout(MegatronConfig(tensor_parallel=2), shared, 2)


def test_experts_are_refused_to_a_dense_model() -> None:
    dense = from_hf(
        QWEN3_30B | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_experts": 0}
    )
    assert dense.moe_layers == 0
    with pytest.raises(
        ValueError, match=r"need a mixture-of-experts model: got 2 and 1 for Qwen3ForCausalLM"
    ):
        check_layout(MegatronConfig(expert_parallel=2), dense, 2)


def test_checks_need_no_torch(tmp_path: Path) -> None:
    """`gspo doctor` checks a layout on a host that has only the config."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    code = (
        "import sys\n"
        "from gspo_dist.learners.megatron.architecture import read_architecture\n"
        "from gspo_dist.learners.megatron.layout import check_layout\n"
        "from gspo_dist.config import MegatronConfig\n"
        f"model = read_architecture({str(tmp_path)!r})\n"
        "print(check_layout(MegatronConfig(expert_parallel=8), model, 8).data)\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "8\n"


def test_knobs_that_contradict_are_refused() -> None:
    def learner(**knobs: object) -> LearnerConfig:
        return LearnerConfig(backend="megatron", megatron=MegatronConfig(**knobs))

    with pytest.raises(ValueError, match=r"optimizer_cpu_offload needs a GPU"):
        check_knobs(learner(optimizer_cpu_offload=True), gpu=False)
    with pytest.raises(ValueError, match=r"precision_aware_optimizer needs distributed_optimizer"):
        check_knobs(learner(precision_aware_optimizer=True, distributed_optimizer=False), gpu=True)
    with pytest.raises(ValueError, match=r"overlap_param_gather needs overlap_grad_reduce"):
        check_knobs(learner(overlap_param_gather=True), gpu=True)
    with pytest.raises(ValueError, match=r"DeepEP\) needs a GPU: use alltoall"):
        check_knobs(learner(token_dispatcher="flex"), gpu=False)


def test_kernels_that_cannot_be_repeated_are_refused_in_the_deterministic_mode() -> None:
    def check(**knobs: object) -> None:
        for deterministic in (False, True):
            megatron = MegatronConfig(expert_parallel=2, **knobs)
            config = {"backend": "megatron", "world_size": 2, "megatron": megatron}
            check_knobs(LearnerConfig(**config, deterministic=deterministic), gpu=True)

    check(overlap_grad_reduce=True, overlap_param_gather=True)
    check(transformer={"moe_permute_fusion": False})
    with pytest.raises(
        ValueError, match=r"flex cannot be had with learner\.deterministic: DeepEP .* alltoall"
    ):
        check(token_dispatcher="flex")
    with pytest.raises(ValueError, match=r"moe_permute_fusion=true cannot be had with .*; unset it"):
        check(transformer={"moe_permute_fusion": True})
    with pytest.raises(ValueError, match=r"deterministic_mode.*set learner\.deterministic"):
        check(transformer={"deterministic_mode": True})


@pytest.mark.parametrize("version", ["2.9.0", "2.10", "2.11.0+c188b53"])
def test_a_version_of_transformer_engine_that_megatron_takes(version, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    check_transformer_engine()


@pytest.mark.parametrize("version", ["1.13", "2.8.0", "2.12.0", "2.20.2", "3.9"])
def test_another_version_is_refused_with_what_was_got(version, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=rf"got {version}, and megatron-core 0\.16\.1 takes >=2\.9,<2\.12;"):
        check_transformer_engine()


def test_the_gpu_form_asks_for_transformer_engine_and_bf16() -> None:
    with pytest.raises(ValueError, match=r"needs Transformer Engine on GPUs: it is not .*learner=deepspeed"):
        check_transformer_engine()
    config = LearnerConfig(backend="megatron", precision="fp32")
    check_knobs(config, gpu=False)
    with pytest.raises(ValueError, match=r"needs learner\.precision=bf16 on GPUs: got fp32"):
        check_knobs(config, gpu=True)
