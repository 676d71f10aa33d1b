"""Writes *.safetensors files tensor by tensor, so that no file is ever in memory.

A file begins with a head that says where each tensor lies, and what will lie there is known at the end. So
room is left for the head, which is written last and filled up with spaces, as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from gspo_dist.weights.folder import StoredTensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch's types -> safetensors' names of them."""
_ENTRY = 96
"""Bytes of a tensor in the head at most, beside its name and shape."""


def head_room(tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes that are enough for the head of a file with any of these tensors. A multiple of 8, so that
    tensors begin where their type may."""
    needed = sum(_ENTRY + len(json.dumps(name)) + 24 * len(t.shape) for name, t in tensors.items()) + _ENTRY
    return -(-needed // 8) * 8


class ShardFile:
    """One file in the making. All its tensors have one type, or some would begin where torch cannot read."""

    def __init__(self, path: Path, room: int) -> None:
        """room: bytes for the head, as `head_room` counts them."""
        self.path, self.room = path, room
        self.head: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.size = 0
        self.file = path.open("wb")
        self.file.seek(8 + room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a contiguous tensor in host memory. Raises OSError on a full disk."""
        self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.head[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        self.size += tensor.nbytes

    def close(self) -> None:
        """Writes the head. A second call does nothing."""
        if self.file.closed:
            return
        with self.file:
            self.file.seek(0)
            head = json.dumps(self.head, separators=(",", ":")).encode()
            assert len(head) <= self.room, "head_room counted too little"
            self.file.write(self.room.to_bytes(8, "little") + head.ljust(self.room))


class ShardWriter:
    """A folder's files: model-00001.safetensors and so on, in the order in which they are begun."""

    def __init__(self, folder: Path, shard_bytes: int, expected: Mapping[str, StoredTensor]) -> None:
        """shard_bytes: of a file's tensors. A larger tensor has a file of its own.
        expected: the tensors that may come.
        """
        self.folder, self.shard_bytes = folder, shard_bytes
        self.left = dict(expected)
        self.open: dict[torch.dtype, ShardFile] = {}
        self.index: dict[str, str] = {}
        """Tensor -> its file."""
        self.total = 0
        """Bytes of all tensors."""
        self._files = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, which is contiguous and in host memory. Raises OSError on a full disk."""
        file = self.open.get(tensor.dtype)
        if file is not None and file.size and file.size + tensor.nbytes > self.shard_bytes:
            file.close()
            file = None
        if file is None:
            self._files += 1
            path = self.folder / f"model-{self._files:05d}.safetensors"
            file = self.open[tensor.dtype] = ShardFile(path, head_room(self.left))
        file.add(name, tensor)
        self.left.pop(name, None)
        self.index[name] = file.path.name
        self.total += tensor.nbytes

    def close(self) -> None:
        """Completes the files and writes the index."""
        for file in self.open.values():
            file.close()
        text = json.dumps(
            {"metadata": {"total_size": self.total}, "weight_map": self.index}, indent=2, sort_keys=True
        )
        (self.folder / "model.safetensors.index.json").write_text(text + "\n")

    def abandon(self) -> None:
        """Closes the files as they are, after an error."""
        for file in self.open.values():
            file.file.close()
