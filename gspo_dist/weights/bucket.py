"""A bucket as bytes: several named tensors laid end to end in one flat buffer, and the description both ends
share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gspo_dist.weights.stream import NamedTensor

ALIGN = 64
"""Bytes: every tensor starts on such a boundary, so that any dtype can be viewed in place."""


@dataclass(frozen=True)
class BucketLayout:
    """Where each tensor lies: name, dtype (torch's name), shape, byte offset; `nbytes` of the whole buffer.

    Example: a [3] float32 'a' and a [2, 2] bfloat16 'b' -> offsets (0, 64), nbytes 128.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    nbytes: int

    @staticmethod
    def of(bucket: Sequence[NamedTensor]) -> BucketLayout:
        offsets, end = [], 0
        for _, tensor in bucket:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGN) * ALIGN
        return BucketLayout(
            names=tuple(name for name, _ in bucket),
            dtypes=tuple(str(t.dtype).removeprefix("torch.") for _, t in bucket),
            shapes=tuple(tuple(t.shape) for _, t in bucket),
            offsets=tuple(offsets),
            nbytes=end,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for an update info."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> BucketLayout:
        """Reads `to_dict`'s data, also after a trip through JSON."""
        return BucketLayout(
            names=tuple(data["names"]),
            dtypes=tuple(data["dtypes"]),
            shapes=tuple(tuple(s) for s in data["shapes"]),
            offsets=tuple(data["offsets"]),
            nbytes=int(data["nbytes"]),
        )

    def views(self, buffer: torch.Tensor) -> Iterator[NamedTensor]:
        """The tensors inside `buffer` [nbytes] uint8, without copying."""
        for name, dtype, shape, offset in zip(
            self.names, self.dtypes, self.shapes, self.offsets, strict=True
        ):
            kind = getattr(torch, dtype)
            count = 1
            for n in shape:
                count *= n
            yield name, buffer[offset : offset + count * kind.itemsize].view(kind).view(shape)

    def fill(self, buffer: torch.Tensor, bucket: Sequence[NamedTensor]) -> None:
        """Copies the tensors of `bucket` into `buffer` (which may lie on another device)."""
        for (_, place), (_, tensor) in zip(self.views(buffer), bucket, strict=True):
            place.copy_(tensor)
