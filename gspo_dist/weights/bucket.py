"""A bucket as bytes: named tensors end to end in one flat buffer, described so that both ends agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gspo_dist.weights.stacks import member_shapes
from gspo_dist.weights.stream import NamedTensor

ALIGN = 64
"""Bytes. Every tensor starts at a multiple of it, so that any dtype can be viewed in place."""


@dataclass(frozen=True)
class BucketLayout:
    """Where each tensor of a bucket lies in the flat buffer.

    Example: a [3] float32 "a" and a [2, 2] bfloat16 "b" -> offsets (0, 64), nbytes 128.
    """

    names: tuple[str, ...]
    """Names of the tensors, in the order of the buffer."""
    dtypes: tuple[str, ...]
    """torch's names of their dtypes, without the prefix: "bfloat16"."""
    shapes: tuple[tuple[int, ...], ...]
    """Their shapes."""
    offsets: tuple[int, ...]
    """Byte at which each starts."""
    nbytes: int
    """Bytes of the whole buffer, gaps included."""

    @staticmethod
    def of(bucket: Sequence[NamedTensor]) -> BucketLayout:
        """The layout of `bucket`, tensor after tensor."""
        offsets, end = [], 0
        for _, tensor in bucket:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGN) * ALIGN  # rounded up to a multiple of ALIGN
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
        """Reads the data of `to_dict`, also after a trip through JSON, which turns tuples into lists."""
        return BucketLayout(
            names=tuple(data["names"]),
            dtypes=tuple(data["dtypes"]),
            shapes=tuple(tuple(s) for s in data["shapes"]),
            offsets=tuple(data["offsets"]),
            nbytes=int(data["nbytes"]),
        )

    def members(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the folder's tensors in the bucket; a stack stands for several."""
        pairs = zip(self.names, self.shapes, strict=True)
        return {member: size for name, shape in pairs for member, size in member_shapes(name, shape)}

    def views(self, buffer: torch.Tensor) -> Iterator[NamedTensor]:
        """The tensors inside `buffer` [nbytes] uint8, without copying."""
        for name, dtype, shape, offset in zip(
            self.names, self.dtypes, self.shapes, self.offsets, strict=True
        ):
            kind = getattr(torch, dtype)
            nbytes = math.prod(shape) * kind.itemsize
            yield name, buffer[offset : offset + nbytes].view(kind).view(shape)

    def fill(self, buffer: torch.Tensor, bucket: Sequence[NamedTensor]) -> None:
        """Copies the tensors of `bucket` into `buffer` [nbytes] uint8, which may lie on another device."""
        for (_, place), (_, tensor) in zip(self.views(buffer), bucket, strict=True):
            place.copy_(tensor)
