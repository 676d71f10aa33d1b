"""From a loss per token to this rank's share of the mini-batch loss; denominators are global and passed in.

Each function maps loss [N] to a scalar. Summed over micro-batches, data-parallel and context-parallel ranks,
the scalars give the loss of the mini-batch, and so do the gradients: sum them, do not average them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gspo_dist.objectives.segments import Segments


@dataclass(frozen=True)
class Denominators:
    """Counts of the whole mini-batch, over all micro-batches and ranks.

    sequences: completions; tokens: trained tokens; max_completion_length: the configured limit, in tokens.
    """

    sequences: int
    tokens: int
    max_completion_length: int

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
    """Sum over tokens / tokens of the mini-batch (DAPO): long completions weigh more."""
    segments.check(loss, "loss")
    return loss.sum() / denominators.tokens


def sequence_mean(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Mean over the tokens of each sequence, then over the sequences (GRPO, GSPO)."""
    segments.check(loss, "loss")
    return (loss * segments.expand(1.0 / segments.lengths.to(loss.dtype))).sum() / denominators.sequences


def sequence_sum(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Sum over the tokens of each sequence, mean over the sequences (MiniRL, REINFORCE)."""
    segments.check(loss, "loss")
    return loss.sum() / denominators.sequences


def constant_length(loss: Tensor, segments: Segments, denominators: Denominators) -> Tensor:
    """Sum over tokens / max_completion_length, mean over the sequences (Dr. GRPO)."""
    segments.check(loss, "loss")
    return loss.sum() / (denominators.sequences * denominators.max_completion_length)


AGGREGATE: dict[str, Callable[[Tensor, Segments, Denominators], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant_length": constant_length,
}
