"""The two passes over a block of logits as Triton kernels, the GPU form of `head.passes.Chunked`.

Each logit is read once per pass, in the dtype that the matmul wrote. All arithmetic is float32. On a GPU the
passes are bound by memory, so their cost beside the matmuls is (bytes moved) / (bandwidth): 2 bytes per logit
forward and 4 backward in bf16, against 2H flops per logit and matmul.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspo_dist.learners.head.passes import Block, SoftmaxState

TILE = 4096  # columns that a program holds at once: 16 float32 registers per thread with 8 warps
WARPS = 8
# Multiplications and additions fused: today's default of Triton, which says that 3.10 will have another one.
FP_FUSION = True


@triton.jit
def _merge_kernel(
    logits,
    bias,
    ids,
    peak,
    total,
    dot,
    taken,
    inverse_temperature,
    width,
    HAS_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * width passes 2**31 from 32k tokens x 64k columns on
    logits += row * width
    token = tl.load(ids + row)
    m = tl.load(peak + row)
    s = tl.load(total + row)
    d = tl.load(dot + row)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        live = columns < width
        x = tl.load(logits + columns, mask=live, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
        x *= inverse_temperature
        new = tl.maximum(m, tl.max(x, 0))
        shift = m - new
        decay = tl.exp(shift)
        x -= new
        e = tl.exp(x)
        if ENTROPY:
            d = decay * (d + shift * s) + tl.sum(tl.where(live, x * e, 0.0), 0)
        s = decay * s + tl.sum(e, 0)
        m = new
    tl.store(peak + row, m)
    tl.store(total + row, s)
    tl.store(dot + row, d)
    inside = (token >= 0) & (token < width)
    x = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + token, mask=inside, other=0.0).to(tl.float32)
    tl.store(taken + row, x * inverse_temperature, mask=inside)


@triton.jit
def _gradient_kernel(
    logits,
    out,
    bias,
    ids,
    lse,
    scale,
    inverse_temperature,
    width,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = columns < width
    token = tl.load(ids + row)
    x = tl.load(logits + row * width + columns, mask=live, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
    p = tl.exp(x * inverse_temperature - tl.load(lse + row))
    g = tl.load(scale + row) * (tl.where(columns == token, 1.0, 0.0) - p)
    tl.store(out + row * width + columns, g.to(out.dtype.element_ty), mask=live)


class TritonPasses:
    """`merge` and `gradient` as `Chunked` states them, for one pair of dtypes.

    Raises ValueError where the kernels cannot run: not on a GPU (Triton's interpreter aside), or in float64.
    """

    merge_destroys = False

    def __init__(self, hidden: Tensor, logits_dtype: torch.dtype) -> None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch, which triton.jit reads
        if hidden.dtype == torch.float64 or not (hidden.is_cuda or interpreted):
            raise ValueError(
                "implementation 'triton' needs hidden on a CUDA device in bfloat16, float16 or float32: got "
                f"{hidden.dtype} on {hidden.device}; use implementation='auto'"
            )
        # The gradient is written over the logits where it has their dtype, and beside them with fp32_head.
        self.logit_buffers = 1 if logits_dtype == hidden.dtype else 2

    def merge(self, block: Block, state: SoftmaxState, with_entropy: bool) -> None:
        logits, bias, ids, factor, _ = block  # `choose_passes` sends no capped block here
        n, width = logits.shape
        if n:
            _merge_kernel[(n,)](
                logits,
                logits if bias is None else bias,
                ids,
                *state,
                factor,
                width,
                HAS_BIAS=bias is not None,
                ENTROPY=with_entropy,
                TILE=TILE,
                num_warps=WARPS,
                enable_fp_fusion=FP_FUSION,
            )

    def gradient(self, block: Block, lse: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        logits, bias, ids, factor, _ = block  # `choose_passes` sends no capped block here
        n, width = logits.shape
        out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
        if n:
            _gradient_kernel[(n, triton.cdiv(width, TILE))](
                logits,
                out,
                logits if bias is None else bias,
                ids,
                lse,
                scale,
                factor,
                width,
                HAS_BIAS=bias is not None,
                TILE=TILE,
                num_warps=WARPS,
                enable_fp_fusion=FP_FUSION,
            )
        return out
