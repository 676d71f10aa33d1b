"""Safetensors files written tensor by tensor: safetensors reads what went in, whatever types come mixed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gspo_dist.weights.folder import StoredTensor, read_head
from gspo_dist.weights.shards import DTYPES, ShardFile, ShardWriter, head_room


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
    assert writer.open[torch.float32].file.closed
    with pytest.raises(ValueError, match="head"):
        read_head(tmp_path / "model-00001.safetensors")


def test_room_for_a_head_is_counted_by_hand():
    """96 bytes a tensor and for the metadata, 24 an extent, the name as JSON, and up to a multiple of 8."""
    assert head_room({}) == 96
    assert head_room({"a": StoredTensor("F32", (), "")}) == 200  # 96 + 3 + 96 = 195
    assert head_room({"abcdef": StoredTensor("F32", (), "")}) == 200  # exactly
    assert head_room({"abcdefg": StoredTensor("F32", (), "")}) == 208
    assert head_room({"a": StoredTensor("F32", (1,) * 6, "")}) == 344  # 96 + 3 + 144 + 96 = 339
    two = {'quo"te': StoredTensor("BF16", (1,), ""), "b": StoredTensor("BF16", (1, 1), "")}
    assert head_room(two) == 376  # 96 + 9 + 24, 96 + 3 + 48, 96: 372


def test_the_longest_head_of_a_tensor_fits_in_its_room(tmp_path):
    """The widest type's name, extents and places of 19 digits: nothing longer can be stored."""
    name, shape = "x" * 50, (10**18,) * 6
    file = ShardFile(tmp_path / "one", head_room({name: StoredTensor("F8_E4M3", shape, "")}))
    file.head[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [10**18, 10**18]}
    file.close()
    whole = (tmp_path / "one").read_bytes()
    assert int.from_bytes(whole[:8], "little") == file.room == len(whole) - 8
    assert json.loads(whole[8:])[name]["shape"] == list(shape)


def test_a_head_without_blanks_may_fill_its_room_and_no_byte_more(tmp_path):
    head = b'{"__metadata__":{"format":"pt"}}'
    ShardFile(tmp_path / "full", len(head)).close()
    assert (tmp_path / "full").read_bytes() == len(head).to_bytes(8, "little") + head
    with pytest.raises(AssertionError, match="head_room counted too little"):
        ShardFile(tmp_path / "over", len(head) - 1).close()


def test_a_file_may_be_exactly_full(tmp_path):
    """Two tensors of 40 bytes under a limit of 80, and the third in a file of its own."""
    tensors = {name: torch.ones(10) for name in "abc"}
    writer = written(tmp_path, tensors, 80)
    assert [writer.index[name][:11] for name in "abc"] == ["model-00001", "model-00001", "model-00002"]


def test_a_later_file_has_room_for_what_is_left_only(tmp_path):
    """The head of the second file need not hold the tensor of the first: 200 bytes, and not 304."""
    writer = written(tmp_path, {"abcdef": torch.tensor(1.0), "ghijkl": torch.tensor(2.0)}, 4)
    rooms = [int.from_bytes((tmp_path / f).read_bytes()[:8], "little") for f in writer.index.values()]
    assert rooms == [304, 200]


def test_the_index_is_sorted_text_for_people(tmp_path):
    written(tmp_path, {"b": torch.ones(1), "a": torch.ones(1)}, 100)
    assert (tmp_path / "model.safetensors.index.json").read_text() == (
        '{\n  "metadata": {\n    "total_size": 8\n  },\n  "weight_map": {\n'
        '    "a": "model-00001.safetensors",\n    "b": "model-00001.safetensors"\n  }\n}\n'
    )
