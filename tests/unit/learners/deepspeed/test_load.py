"""A model filled parameter by parameter from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.learners.deepspeed.load import copy_into, expert_parts
from gspo_dist.weights.folder import ModelFolder


def tiny() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        )
    )


def files(folder: Path) -> list[str]:
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_parameters_filled_one_by_one_equal_the_saved_model(tmp_path: Path, shard_size: str) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (
        1 if shard_size == "1GB" else len(set(files(tmp_path)))
    )
    checkpoint = ModelFolder(tmp_path)
    for name, parameter in model.named_parameters():
        target = torch.full_like(parameter, float("nan"))
        copy_into(target, name, checkpoint)
        assert torch.equal(target, parameter), name


def test_a_weight_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for gone in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        save_file({n: t for n, t in weights.items() if n != gone}, tmp_path / "model.safetensors")
        checkpoint = ModelFolder(tmp_path)
        bad = {}
        for name, parameter in model.named_parameters():
            try:
                copy_into(torch.empty_like(parameter), name, checkpoint)
            except ValueError as error:
                bad[name] = str(error)
        (owner,) = bad
        assert owner == gone or gone.startswith(owner.removesuffix("gate_up_proj"))
        assert f"lacks the weights ['{gone}']" in bad[owner]


def test_the_parts_of_a_fused_expert_parameter_by_hand() -> None:
    fused = expert_parts("mlp.experts.gate_up_proj", torch.Size([2, 6, 5]))
    assert fused == [
        ("mlp.experts.0.gate_proj.weight", (0, slice(0, 3))),
        ("mlp.experts.0.up_proj.weight", (0, slice(3, None))),
        ("mlp.experts.1.gate_proj.weight", (1, slice(0, 3))),
        ("mlp.experts.1.up_proj.weight", (1, slice(3, None))),
    ]
    down = expert_parts("mlp.experts.down_proj", torch.Size([2, 5, 3]))
    assert [name for name, _ in down] == ["mlp.experts.0.down_proj.weight", "mlp.experts.1.down_proj.weight"]
    assert expert_parts("mlp.down_proj.weight", torch.Size([5, 3])) == []
    assert expert_parts("conv.weight", torch.Size([5, 1, 3])) == []
