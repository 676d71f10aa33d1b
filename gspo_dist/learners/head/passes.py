"""The two passes over a block of logits that stand between the head's matmuls, in plain torch and compiled.

`merge` folds a block into the running softmax of every token. `gradient` turns a block into the gradient of
its logits. Everything between two matmuls happens here, so this is what an implementation is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class SoftmaxState(NamedTuple):
    """The running log-softmax of N tokens over the columns seen so far."""

    peak: Tensor
    """[N] m = max x."""
    total: Tensor
    """[N] sum exp(x - m)."""
    dot: Tensor
    """[N] sum (x - m) exp(x - m). The entropy, log total - dot / total, then cancels nothing of m's size."""
    taken: Tensor
    """[N] x[y], -inf until y's column was seen."""


class Block(NamedTuple):
    """A block of v columns of the logits. A pass may destroy the logits.

    Example: in the second block of 10 columns, token 13 has id 3 and token 7 has id -3 (another block's).
    """

    logits: Tensor
    """[N, v] raw: before bias and temperature."""
    bias: Tensor | None
    """[v]."""
    ids: Tensor
    """[N] relative to the block; outside [0, v) the token's column is in another block."""
    factor: float
    """What logits and bias are multiplied with: the model's logit scale over the temperature."""
    cap: float | None = None
    """The model's soft cap over the temperature: x = cap tanh(factor (logits + bias) / cap). None: no cap."""


class Passes(Protocol):
    """The two passes over a block of logits, as `Chunked` states them."""

    logit_buffers: int
    """Tensors of the block's shape that a pass holds at once, the logits included."""
    merge_destroys: bool
    """True when `merge` leaves something else where the logits were."""

    def merge(self, block: Block, state: SoftmaxState, with_entropy: bool) -> None:
        """Merges a block into `state`, in place. Once per block; `dot` only when `with_entropy`."""
        ...

    def gradient(self, block: Block, lse: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """scale_i (1[column of y_i] - p[i, v]), the gradient of the raw logits: [N, v] in `dtype`.

        Under a cap each is multiplied with the cap's slope, 1 - (x / cap)^2.

        lse [N]: log-sum-exp over all columns.
        scale [N]: the gradient of the log-prob times `block.factor`.
        """
        ...


class Chunked:
    """The passes in plain torch. In place: on a CPU a pass over memory costs as much as its arithmetic."""

    def __init__(self, upcast: bool) -> None:
        """upcast: whether the logits are narrower than the arithmetic, and so are copied first."""
        self.logit_buffers = 3 if upcast else 2  # the logits, their float32 copy, the exponentials
        self.merge_destroys = not upcast

    def merge(self, block: Block, state: SoftmaxState, with_entropy: bool) -> None:
        """As `Passes.merge`."""
        peak, total, dot, taken = state
        x = _scaled(block, peak.dtype)
        inside, column = _locate(block.ids, x.shape[1])
        taken.copy_(torch.where(inside, x.gather(1, column[:, None])[:, 0], taken))
        new = torch.maximum(peak, x.amax(1))
        shift = peak - new
        decay = shift.exp()
        peak.copy_(new)
        x.sub_(new[:, None])
        # Without the entropy nothing needs x again, so its memory takes the exponentials.
        e = x.exp() if with_entropy else x.exp_()
        if with_entropy:
            # (x - new) exp(x - new) = decay ((x - peak) + shift) exp(x - peak), with `total` as it was
            dot.add_(shift * total).mul_(decay)
        total.mul_(decay).add_(e.sum(1))
        if with_entropy:
            dot.add_(e.mul_(x).sum(1))

    def gradient(self, block: Block, lse: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Passes.gradient`; over the logits where they have `dtype`."""
        x = _scaled(block, lse.dtype)
        inside, column = _locate(block.ids, x.shape[1])
        slope = None if block.cap is None else 1.0 - (x / block.cap).square_()
        x.sub_(lse[:, None]).exp_().mul_(-scale[:, None])
        x.scatter_add_(1, column[:, None], torch.where(inside, scale, 0.0)[:, None])
        if slope is not None:
            x.mul_(slope)
        if x.dtype == dtype:
            return x
        return block.logits.copy_(x) if block.logits.dtype == dtype else x.to(dtype)


class Compiled:
    """`Chunked` through torch.compile, which fuses each pass; the clones are fused away with the rest."""

    logit_buffers = 2
    merge_destroys = False

    def __init__(self) -> None:
        eager = Chunked(upcast=False)

        def merge(block: Block, *rest: Any) -> None:
            # Without the clone, the in-place updates of the logits would be written back to memory.
            eager.merge(block._replace(logits=block.logits.clone()), *rest)

        def gradient(block: Block, *rest: Any) -> Tensor:
            result = eager.gradient(block._replace(logits=block.logits.clone()), *rest)
            return block.logits.copy_(result) if block.logits.dtype == result.dtype else result

        # fullgraph: too many recompilations then raise, where torch would fall back to eager with a warning.
        self.merge = torch.compile(merge, dynamic=True, fullgraph=True)
        self.gradient = torch.compile(gradient, dynamic=True, fullgraph=True)


def _scaled(block: Block, dtype: torch.dtype) -> Tensor:
    """x of a block, in `dtype`; over the logits where they have it already."""
    x = block.logits.to(dtype)
    if block.bias is not None:
        x.add_(block.bias)
    if block.cap is not None:
        return x.mul_(block.factor / block.cap).tanh_().mul_(block.cap)
    return x if block.factor == 1.0 else x.mul_(block.factor)


def _locate(ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which tokens' columns are in a block of `width`, and those columns (0 for the others)."""
    inside = (ids >= 0) & (ids < width)
    return inside, torch.where(inside, ids, 0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
