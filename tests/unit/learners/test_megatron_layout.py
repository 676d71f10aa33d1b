"""Layouts and architectures are checked before anything starts, without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist.config import MegatronConfig
from gspo_dist.learners.megatron.architecture import Architecture, from_hf, read_architecture
from gspo_dist.learners.megatron.layout import check_layout

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
}


@pytest.fixture
def model() -> Architecture:
    return from_hf(QWEN3_30B)


def test_both_spellings_of_rope_read_alike(model: Architecture) -> None:
    new = {k: v for k, v in QWEN3_30B.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert from_hf(new) == model
    assert model.rope_theta == 1e6


def test_moe_layers_follow_step_and_exceptions() -> None:
    config = QWEN3_30B | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert from_hf(config).moe_layers == (False, True, False, False, False, True)


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
def test_published_layouts_pass_and_factor_the_ranks(model: Architecture, ranks: int, sizes: dict) -> None:
    layout = check_layout(MegatronConfig(**sizes), model, ranks)
    assert layout.data * layout.tensor * layout.context * layout.pipeline == ranks
    assert layout.expert_data * layout.expert * layout.expert_tensor * layout.pipeline == ranks


@pytest.mark.parametrize(
    ("ranks", "sizes", "message"),
    [
        (
            8,
            {"expert_parallel": 4, "tensor_parallel": 2, "token_dispatcher": "allgather"},
            r"allgather cannot serve experts shared by data replicas.*expert_parallel 4 x .* above tensor_parallel 2 x",
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
        (6, {"tensor_parallel": 4}, r"context_parallel must divide world_size: got 4 and 6; try 1, 2, 3, 6"),
        (
            4,
            {"expert_parallel": 8},
            r"expert_parallel x pipeline_parallel must divide world_size: got 8 and 4; try 1, 2, 4",
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
def test_refusals_name_the_numbers(model: Architecture, ranks: int, sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(MegatronConfig(**sizes), model, ranks)


def test_vocabulary_and_kv_heads_must_divide(model: Architecture) -> None:
    with pytest.raises(ValueError, match=r"vocab_size: got 2 and 151937; try 1, "):
        check_layout(MegatronConfig(tensor_parallel=2), dataclasses.replace(model, vocab_size=151937), 2)
    with pytest.raises(ValueError, match=r"num_key_value_heads or be a multiple of it: got 2 and 3"):
        check_layout(MegatronConfig(tensor_parallel=2), dataclasses.replace(model, num_kv_heads=3), 2)


def test_experts_are_refused_to_a_dense_model() -> None:
    dense = from_hf(QWEN3_30B | {"architectures": ["Qwen3ForCausalLM"]})
    assert dense.num_moe_layers == 0
    with pytest.raises(ValueError, match=r"need a mixture-of-experts model: got 2 and 1"):
        check_layout(MegatronConfig(expert_parallel=2), dense, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"'GPT2LMHeadModel': it builds Qwen3MoeForCausalLM, Qwen3ForCausalLM",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_type 'default' only: got 'yarn'"),
        ({"attention_bias": True}, r"no attention_bias"),
        ({"use_sliding_window": True}, r"no sliding window"),
    ],
)
def test_unsupported_models_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(QWEN3_30B | change)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json is missing"):
        read_architecture(tmp_path)


def test_checks_need_no_torch(tmp_path: Path) -> None:
    """`gspo doctor` checks a layout on a host that has only the config."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    code = (
        "import sys\n"
        "from gspo_dist.learners.megatron.architecture import read_architecture\n"
        "from gspo_dist.learners.megatron.layout import check_layout\n"
        "from gspo_dist.config import MegatronConfig\n"
        f"print(check_layout(MegatronConfig(expert_parallel=8), read_architecture({str(tmp_path)!r}), 8).expert_data)\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
