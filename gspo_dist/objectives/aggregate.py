"""The sequence of every trained token, and how a loss per token becomes a share of the mini-batch loss.

N trained tokens of S sequences. An aggregation maps loss [N] to a scalar; its denominators are global and
passed in. The scalars of all micro-batches, data-parallel and context-parallel ranks add up to the loss of
the mini-batch, and so do the gradients: sum them, do not average them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# --- segments ---


@dataclass(frozen=True, eq=False)
class Segments:
    """The sequence of every trained token.

    Example: ids [0, 0, 1] and count 2 have the lengths [2, 1]. mean([1., 3., 5.]) is [2., 5.], and
    expand([7., 8.]) is [7., 7., 8.].
    Raises ValueError for a wrong shape or type, ids out of range, or a sequence without a trained token,
    which it names.
    """

    ids: Tensor
    """int64 [N], values in [0, count), in any order."""
    count: int
    """S, the number of sequences."""
    all_reduce: Callable[[Tensor], Tensor] | None = None
    """The sum over the context-parallel ranks, each of which holds a part of every sequence.

    It is differentiable, and its backward is a sum over the ranks too, because the loss is the sum of their
    local losses. It must not change its argument. It is called here once with float64 counts, so that all
    ranks must build their Segments together."""
    lengths: Tensor = field(init=False, repr=False)
    """int64 [S], trained tokens of each sequence over all ranks."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64:
            raise ValueError(f"segments.ids must be int64 [N]: got {self.ids.dtype} {list(self.ids.shape)}")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"segments.count must be an int >= 1: got {self.count!r}")
        if self.ids.numel():
            low, high = (int(bound) for bound in torch.aminmax(self.ids))
            if low < 0 or high >= self.count:
                raise ValueError(f"segments.ids must lie in [0, count={self.count}): got {low} to {high}")
        local = torch.bincount(self.ids, minlength=self.count)
        with torch.no_grad():
            whole = local if self.all_reduce is None else self.all_reduce(local.double()).round().long()
        empty = (whole == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"segments: every sequence needs a trained token: got none for sequence {empty[0]} of "
                f"{self.count} ({len(empty)} in all); drop such completions before packing"
            )
        object.__setattr__(self, "lengths", whole)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x [N] over the tokens of each sequence, over all ranks: [S]; differentiable."""
        self.check(x, "x")
        # A sum of thousands of 16-bit terms would lose whole tokens.
        x = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
        total = x.new_zeros(self.count).index_add(0, self.ids, x)
        return total if self.all_reduce is None else self.all_reduce(total)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x [N] over the tokens of each whole sequence: [S]; differentiable."""
        total = self.sum(x)
        return total / self.lengths.to(total.dtype)

    def expand(self, v: Tensor) -> Tensor:
        """v [S] given to each token of its sequence: [N]; differentiable."""
        if v.shape != (self.count,):
            raise ValueError(f"segments.expand takes [S={self.count}]: got {list(v.shape)}")
        # index_select, not v[ids]: its backward is one index_add, where indexing sorts or writes one by one.
        return v.index_select(0, self.ids)

    def check(self, x: Tensor, name: str) -> None:
        """ValueError unless x is [N]."""
        if x.shape != self.ids.shape:
            raise ValueError(
                f"{name} must be [N={self.ids.numel()}], one per trained token: got {list(x.shape)}"
            )


# --- aggregations ---


@dataclass(frozen=True)
class Denominators:
    """Counts of the whole mini-batch, over all micro-batches and ranks.

    Raises ValueError for a count below 1, or fewer tokens than sequences.
    """

    sequences: int
    """Completions."""
    tokens: int
    """Trained tokens."""
    max_completion_length: int
    """The configured limit, in tokens."""

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens", "max_completion_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"denominators.{name} must be an int >= 1, counted over the mini-batch: got {value!r}"
                )
        if self.tokens < self.sequences:
            raise ValueError(
                f"denominators.tokens must be >= sequences, each sequence has a trained token: "
                f"got {self.tokens} tokens and {self.sequences} sequences"
            )


def token_mean(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Sum over tokens / tokens of the mini-batch: long completions weigh more. DAPO, arXiv 2503.14476."""
    segments.check(loss, "loss")
    return loss.sum() / denominators.tokens


def sequence_mean(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Mean over the tokens of each sequence, then over sequences. GRPO, GSPO: arXiv 2507.18071 eq 2 and 5."""
    segments.check(loss, "loss")
    return (loss * segments.expand(1.0 / segments.lengths.to(loss.dtype))).sum() / denominators.sequences


def sequence_sum(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Sum over the tokens of each sequence, mean over the sequences. MiniRL, arXiv 2512.01374; REINFORCE."""
    segments.check(loss, "loss")
    return loss.sum() / denominators.sequences


def constant_length(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Sum over tokens / max_completion_length, mean over the sequences. Dr. GRPO, arXiv 2503.20783."""
    segments.check(loss, "loss")
    return loss.sum() / (denominators.sequences * denominators.max_completion_length)


AGGREGATE: dict[str, Callable[[Tensor, Segments, Denominators], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant_length": constant_length,
}
"""Aggregation by name: (loss [N], segments, denominators) -> scalar."""
