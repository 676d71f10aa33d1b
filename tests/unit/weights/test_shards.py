"""Safetensors files written tensor by tensor: safetensors reads what went in, whatever types come mixed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gspo_dist.weights.folder import StoredTensor, read_head
from gspo_dist.weights.shards import DTYPES, ShardWriter


def written(folder, tensors: dict[str, torch.Tensor], shard_bytes: int) -> ShardWriter:
    expected = {n: StoredTensor(DTYPES[t.dtype], tuple(t.shape), "") for n, t in tensors.items()}
    writer = ShardWriter(folder, shard_bytes, expected)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return writer


def test_every_type_is_read_back_by_safetensors(tmp_path):
    """Odd counts of bytes lie before wider types; a scalar and an empty tensor are among them."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (24,), generator=generator, dtype=torch.uint8)
    tensors = {f"t{i}": raw[:8].view(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.arange(5, dtype=torch.float32)}
    tensors |= {"one": torch.tensor(2.5), "none": torch.zeros(0, 4), 'quo"te': torch.ones(1)}
    writer = written(tmp_path, tensors, 1 << 20)
    held = {n: t for file in set(writer.index.values()) for n, t in load_file(tmp_path / file).items()}
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert held[name].dtype == tensor.dtype
        assert held[name].shape == tensor.shape
        same = [t.reshape(-1).view(torch.uint8) for t in (held[name], tensor)]
        assert torch.equal(*same), name


def test_files_and_index_by_hand(tmp_path):
    """40, 40 and 30 bytes under 100, then 200 alone, then another type."""
    tensors = {n: torch.full((size,), 1.0) for n, size in (("a", 10), ("b", 10), ("c", 8), ("d", 50))}
    tensors["e"] = torch.ones(2, dtype=torch.int64)
    written(tmp_path, tensors, 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001.safetensors",
        "b": "model-00001.safetensors",
        "c": "model-00002.safetensors",
        "d": "model-00003.safetensors",
        "e": "model-00004.safetensors",
    }
    assert index["metadata"]["total_size"] == 4 * 78 + 16
    with safe_open(tmp_path / "model-00001.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert read_head(tmp_path / "model-00001.safetensors")["b"].shape == (10,)


def test_a_file_that_was_abandoned_is_no_safetensors_file(tmp_path):
    writer = ShardWriter(tmp_path, 100, {"a": StoredTensor("F32", (2,), "")})
    writer.add("a", torch.ones(2))
    writer.abandon()
    with pytest.raises(ValueError, match="head"):
        read_head(tmp_path / "model-00001.safetensors")
