"""The norm that gradients are clipped by, on a CPU as exact as on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

WHOLE = 1 << 17
"""Elements of a tensor up to which torch's own norm is taken."""
PIECE = 1 << 14
"""Elements of the pieces that a larger tensor is cut into."""


def tensor_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The 2-norm of a tensor, as a scalar of its type.

    torch (2.13) adds the squares up in float32 on a CPU, one after the other in each lane. Of 28 million
    normal numbers, a vocabulary of 49,152 times 576, it loses 0.17%. So a large tensor is cut into pieces.
    """
    if tensor.device.type != "cpu" or tensor.numel() <= WHOLE:
        return torch.linalg.vector_norm(tensor)
    norms = torch.stack([torch.linalg.vector_norm(piece) for piece in tensor.reshape(-1).split(PIECE)])
    return torch.linalg.vector_norm(norms)


def total_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all of them as one vector."""
    return torch.linalg.vector_norm(torch.stack([tensor_norm(tensor) for tensor in tensors]))
