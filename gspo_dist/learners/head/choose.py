"""Which implementation of the two passes a head runs with."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gspo_dist.learners.head.passes import Chunked, Compiled, Passes, accumulator

IMPLEMENTATIONS = ("auto", "chunked", "compiled", "triton")


@functools.cache
def _compiled() -> Compiled:
    return Compiled()


def choose_passes(
    implementation: str, hidden: Tensor, logits_dtype: torch.dtype, *, capped: bool = False
) -> Passes:
    """The passes of one of `IMPLEMENTATIONS`, for `hidden`'s device and dtype.

    capped: whether the model caps its logits, which the Triton kernels cannot do.

    "auto" is triton on a GPU, and chunked elsewhere, for float64 and for capped logits. Raises ValueError for
    a name that is not there, and for "triton" where its kernels cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}: got {implementation!r}"
        )
    if implementation == "auto":
        kernels = hidden.is_cuda and hidden.dtype != torch.float64 and not capped
        implementation = "triton" if kernels else "chunked"
    if implementation == "compiled":
        return _compiled()
    if implementation == "triton":
        if capped:
            raise ValueError("implementation 'triton' has no soft cap of logits: use implementation='auto'")
        # Imported here: triton is absent from builds of torch without a GPU.
        from gspo_dist.learners.head.kernels import TritonPasses

        return TritonPasses(hidden, logits_dtype)
    return Chunked(upcast=logits_dtype != accumulator(hidden.dtype))
