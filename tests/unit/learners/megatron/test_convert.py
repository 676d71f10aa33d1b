"""Conversion rules and slices of HF files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.convert import QKV, GateUp, SafetensorsFolder, Split, Whole, rule_for
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

MODEL = from_hf(QWEN3_30B)


class Tensors:
    """HF tensors held in memory."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor[rows] if tensor.dim() == 1 else tensor[rows, columns]


def round_trip(rule, source: Tensors, size: int) -> dict[str, torch.Tensor]:
    return dict(rule.export([rule.load(source, rank, size) for rank in range(size)]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rule_gives_back_what_it_read(size: int) -> None:
    torch.manual_seed(0)
    source = Tensors(
        q=torch.randn(32, 5),
        k=torch.randn(16, 5),
        v=torch.randn(16, 5),
        g=torch.randn(8, 5),
        u=torch.randn(8, 5),
        w=torch.randn(8, 12),
        n=torch.randn(6),
    )
    for rule in (
        QKV("q", "k", "v", groups=4, heads=8, head_dim=4),
        GateUp("g", "u"),
        Split("w", 0),
        Split("w", 1),
        Whole("n"),
    ):
        for name, tensor in round_trip(rule, source, size).items():
            assert torch.equal(tensor, source.tensors[name])


def test_groups_of_heads_lie_together() -> None:
    """np 4, ng 2, d 1: rows q0 q1 k0 v0 | q2 q3 k1 v1; the second tensor rank holds the second group."""
    source = Tensors(
        q=torch.tensor([[0.0], [1.0], [2.0], [3.0]]),
        k=torch.tensor([[10.0], [11.0]]),
        v=torch.tensor([[20.0], [21.0]]),
    )
    rule = QKV("q", "k", "v", groups=2, heads=4, head_dim=1)
    assert rule.load(source, 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert rule.load(source, 1, 2).flatten().tolist() == [2, 3, 11, 21]


def test_both_layer_kinds_name_the_same_tensors() -> None:
    """Transformer Engine's fused norms and grouped experts against the local layers' separate ones."""
    pairs = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.experts.linear_fc1.weight77": "mlp.experts.local_experts.77.linear_fc1.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for engine, local in pairs.items():
        assert rule_for(f"decoder.layers.5.{engine}", MODEL) == rule_for(f"decoder.layers.5.{local}", MODEL)
    assert rule_for("decoder.layers.5.mlp.experts.linear_fc2.weight77", MODEL) == Split(
        "model.layers.5.mlp.experts.77.down_proj.weight", 1
    )
    with pytest.raises(
        ValueError, match=r"no conversion for the megatron parameter decoder.layers.0.mystery.weight"
    ):
        rule_for("decoder.layers.0.mystery.weight", MODEL)


def test_mixtral_and_shared_experts_have_the_names_of_their_files() -> None:
    mixtral = dataclasses.replace(MODEL, family="mixtral")
    stem = "model.layers.5.block_sparse_moe"
    assert rule_for("decoder.layers.5.mlp.router.weight", mixtral) == Whole(f"{stem}.gate.weight")
    for name in ("experts.local_experts.7.linear_fc1.weight", "experts.linear_fc1.weight7"):
        rule = rule_for(f"decoder.layers.5.mlp.{name}", mixtral)
        assert rule == GateUp(f"{stem}.experts.7.w1.weight", f"{stem}.experts.7.w3.weight")
    rule = rule_for("decoder.layers.5.mlp.experts.linear_fc2.weight7", mixtral)
    assert rule == Split(f"{stem}.experts.7.w2.weight", 1)
    shared = "model.layers.5.mlp.shared_expert"
    assert rule_for("decoder.layers.5.mlp.shared_experts.linear_fc1.weight", MODEL) == GateUp(
        f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"
    )
    rule = rule_for("decoder.layers.5.mlp.shared_experts.linear_fc2.weight", MODEL)
    assert rule == Split(f"{shared}.down_proj.weight", 1)
    gate = rule_for("decoder.layers.5.mlp.shared_experts.gate_weight", MODEL)
    assert gate == Whole("model.layers.5.mlp.shared_expert_gate.weight")


def test_folder_reads_slices_fused_experts_and_names_what_is_missing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    gate_up, down, plain = torch.randn(3, 8, 5), torch.randn(3, 5, 4), torch.randn(6, 5)
    stem = "model.layers.0.mlp.experts"
    save_file({f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": plain}, tmp_path / "b.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(folder.read(f"{stem}.2.gate_proj.weight"), gate_up[2, :4])
    assert torch.equal(folder.read(f"{stem}.2.up_proj.weight", rows=slice(1, 3)), gate_up[2, 5:7])
    assert torch.equal(folder.read(f"{stem}.1.down_proj.weight", columns=slice(2, 4)), down[1, :, 2:4])
    assert folder.shape(f"{stem}.0.up_proj.weight") == (4, 5)
    assert folder.shape(f"{stem}.0.down_proj.weight") == (5, 4)
    assert torch.equal(folder.read("lm_head.weight", rows=slice(2, 4)), plain[2:4])
    with pytest.raises(ValueError, match=r"no tensor model.norm.weight"):
        folder.read("model.norm.weight")


def test_a_torn_shard_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"weight file .*model\.safetensors is torn"):
        SafetensorsFolder(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks model-00002-of-00002\.safetensors, which its index names; copy the folder"
    ):
        SafetensorsFolder(tmp_path)
