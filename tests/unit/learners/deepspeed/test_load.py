"""A model filled parameter by parameter from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.learners.deepspeed.load import copy_into, parts
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames
from tests.unit.weights.tiny_models import FAMILIES, make


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
        copy_into(target, name, checkpoint, FileNames(model))
        assert torch.equal(target, parameter), name


def test_a_weight_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    model = tiny()
    names = FileNames(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for gone in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        save_file({n: t for n, t in weights.items() if n != gone}, tmp_path / "model.safetensors")
        checkpoint = ModelFolder(tmp_path)
        bad = {}
        for name, parameter in model.named_parameters():
            try:
                copy_into(torch.empty_like(parameter), name, checkpoint, names)
            except ValueError as error:
                bad[name] = str(error)
        (owner,) = bad
        assert owner == gone or gone.startswith(owner.removesuffix("gate_up_proj"))
        assert f"lacks the weights ['{gone}']" in bad[owner]


def test_the_parts_of_a_fused_expert_parameter_by_hand() -> None:
    """gate_up [4, 16, 16] of Qwen3-MoE: the gate's 8 rows of 16, then the up projection's."""
    names = FileNames(tiny())
    stem = "model.layers.0.mlp.experts"
    found = {(p.file, p.row): p.index for p in parts(f"{stem}.gate_up_proj", torch.Size([4, 16, 16]), names)}
    assert found.keys() == {
        (f"{stem}.{e}.{half}_proj.weight", e) for e in range(4) for half in ("gate", "up")
    }
    assert torch.equal(found[f"{stem}.3.gate_proj.weight", 3], torch.arange(0, 128))
    assert torch.equal(found[f"{stem}.2.up_proj.weight", 2], torch.arange(128, 256))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_filled_from_the_names_of_its_own_folder(family: str, tmp_path: Path) -> None:
    """Mixtral calls its projections w1 to w3, Granite keeps experts fused under other names."""
    model = make(tmp_path, family)
    checkpoint, names = ModelFolder(tmp_path), FileNames(model)
    read = set()
    for name, parameter in model.named_parameters():
        target = torch.full_like(parameter, float("nan"))
        read.update(copy_into(target, name, checkpoint, names))
        assert torch.equal(target, parameter), name
    buffers = {n for n in checkpoint.tensors if n.endswith("e_score_correction_bias")}
    assert read == set(checkpoint.tensors) - buffers
