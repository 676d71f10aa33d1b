"""Weights as a stream of named tensors in buckets, so that never two full copies are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

NamedTensor = tuple[str, torch.Tensor]


def buckets(
    weights: Iterable[NamedTensor],
    bucket_bytes: int,
    nbytes: Callable[[torch.Tensor], int] = lambda tensor: tensor.nbytes,
) -> Iterator[list[NamedTensor]]:
    """Groups named tensors, in order, into buckets of at most `bucket_bytes`. A larger tensor travels alone.

    nbytes: what a tensor counts. A sharded parameter counts what it will take once it is gathered.

    Example: tensors of 40, 40, 30 and 200 bytes under 100 give [40, 40], [30], [200].
    """
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + nbytes(tensor) > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += nbytes(tensor)
    if bucket:
        yield bucket
