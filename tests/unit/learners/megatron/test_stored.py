"""A Megatron checkpoint read by one process: weights alone, an expert at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from gspo_dist.learners.megatron import stored
from gspo_dist.learners.megatron.stored import stored_weights
from gspo_dist.models.shape import ModelShape, shape_from_config
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
MODEL: ModelShape = shape_from_config(
    QWEN3_30B | {"hidden_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
)


def make(folder: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two layers' tensors as a Megatron save names them, and what the optimiser keeps of one."""
    generator = torch.Generator().manual_seed(0)
    experts, ffn, hidden = MODEL.num_experts, MODEL.expert_ffn, MODEL.hidden

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {
        "decoder.layers.10.mlp.experts.experts.linear_fc1.weight": some(experts, 2 * ffn, hidden),
        "decoder.layers.2.mlp.experts.experts.linear_fc2.weight": some(experts, hidden, ffn),
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight": some(hidden),
        "decoder.final_layernorm.weight": some(hidden),
    }
    state = {
        f"optimizer.state.{s}.decoder.final_layernorm.weight": torch.randn(64, hidden) for s in ("a", "b")
    }
    dcp.save({**tensors, **state, **more}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return tensors


def test_names_and_numbers_by_hand_layer_after_layer(tmp_path: Path) -> None:
    """Expert 3's gate is the first half of its rows of fc1, and its up projection the second."""
    held = make(tmp_path)
    got = list(stored_weights(tmp_path, MODEL))
    tensors = dict(got)
    experts, rows = MODEL.num_experts, MODEL.expert_ffn
    assert len(got) == len(tensors) == 2 + 3 * experts
    fc1 = held["decoder.layers.10.mlp.experts.experts.linear_fc1.weight"]
    fc2 = held["decoder.layers.2.mlp.experts.experts.linear_fc2.weight"]
    for e in range(experts):
        assert torch.equal(tensors[f"model.layers.10.mlp.experts.{e}.gate_proj.weight"], fc1[e, :rows])
        assert torch.equal(tensors[f"model.layers.10.mlp.experts.{e}.up_proj.weight"], fc1[e, rows:])
        assert torch.equal(tensors[f"model.layers.2.mlp.experts.{e}.down_proj.weight"], fc2[e])
    norm = held["decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"]
    assert torch.equal(tensors["model.layers.2.input_layernorm.weight"], norm)
    layers = [int(name.split(".")[2]) for name, _ in got if "layers" in name]
    assert layers == sorted(layers)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_only_weights_are_read_and_each_once(tmp_path: Path, monkeypatch) -> None:
    make(tmp_path)
    places = FileSystemReader(str(tmp_path)).read_metadata().storage_data
    seen: list[int] = []
    slice_file = FileSystemReader._slice_file

    def counted(self, file, info):
        seen.append(info.offset)
        return slice_file(self, file, info)

    monkeypatch.setattr(FileSystemReader, "_slice_file", counted)
    list(stored_weights(tmp_path, MODEL))
    weights = {p.offset for i, p in places.items() if not i.fqn.startswith("optimizer.")}
    assert set(seen) == weights
    assert len(weights) == 4 < len(places)


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch) -> None:
    make(tmp_path)
    boxes: list[tuple[int, ...]] = []
    read = stored._read

    def noted(reader, name, tensor, offsets, sizes):
        boxes.append(sizes)
        return read(reader, name, tensor, offsets, sizes)

    monkeypatch.setattr(stored, "_read", noted)
    stream = stored_weights(tmp_path, MODEL)
    for _ in range(2):  # the final norm, and the first norm of layer 2 or its first expert
        next(stream)
    assert len(boxes) <= 2, "read ahead"
    list(stream)
    assert all(sizes[0] == 1 for sizes in boxes if len(sizes) == 3)
    assert sum(len(sizes) == 3 for sizes in boxes) == 2 * MODEL.num_experts


def test_what_balances_the_experts_is_left_out_and_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    known = make(tmp_path / "a", **{"decoder.layers.2.mlp.router.expert_bias": torch.ones(4)})
    assert not any("bias" in name for name, _ in stored_weights(tmp_path / "a", MODEL))
    assert len(known) == 4
    make(tmp_path / "b", **{"decoder.layers.2.mlp.odd.weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"no conversion for .*layers\.2\.mlp\.odd\.weight"):
        list(stored_weights(tmp_path / "b", MODEL))
