"""What the objectives share: the record that they return, bounded ratios, and where a clip binds.

Shapes and units are those of `losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_dist.objectives.aggregate import Segments

LOG_RATIO_LIMIT = 20.0
"""Log ratios are held within this size. exp(20) = 4.9e8 is finite in float32 and beyond any ratio that still
carries information. Outside of it the gradient is 0."""
LEAST_REST = 1e-8
"""Least probability that a logarithm is taken of, where float32 rounds a probability to 1 or to 0."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """An objective before aggregation. N trained tokens."""

    loss: Tensor
    """[N], to minimise, with gradient."""
    ratio: Tensor
    """[N], the ratio that was clipped; constant in a sequence for sequence-level objectives."""
    clipped_low: Tensor
    """bool [N], the tokens on which the lower bound binds."""
    clipped_high: Tensor
    """bool [N], the tokens on which the upper bound binds."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of log_ratio held in [-20, 20], so that one broken token cannot make the loss infinite."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def binding(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away, two bool [N].

    The lower bound binds where the ratio is below 1 - clip_low and A < 0, the upper one where it is above
    1 + clip_high and A > 0.
    """
    return (ratio < 1.0 - clip_low) & (advantages < 0), (ratio > 1.0 + clip_high) & (advantages > 0)


def outside(change: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where a change goes too far in the direction that A asks, two bool [N].

    The first is below -low with A < 0, the second above high with A > 0.
    """
    return (change < -low) & (advantages < 0), (change > high) & (advantages > 0)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), [N]."""
    # Written as the ratio with its binding bound put in, which tells at once where it binds.
    low, high = binding(ratio, advantages, clip_low, clip_high)
    used = ratio.masked_fill(low, 1.0 - clip_low).masked_fill(high, 1.0 + clip_high)
    return Surrogate(-used * advantages, ratio.detach(), low, high)


def require_constant(advantages: Tensor, segments: Segments, objective: str) -> None:
    """ValueError unless the advantage is the same on all (local) tokens of each sequence."""
    some = advantages.new_zeros(segments.count).scatter(0, segments.ids, advantages)
    differs = advantages != segments.expand(some)
    if bool(differs.any()):
        sequence = int(segments.ids[differs][0])
        raise ValueError(
            f"advantages must be constant within a sequence for {objective}: got several values in sequence "
            f"{sequence}; use gspo_token for advantages per token"
        )


def geometric_mean(log_ratio: Tensor, segments: Segments) -> Tensor:
    """exp(1/|y| sum_t log_ratio) at every token of its sequence, [N]."""
    return segments.expand(bounded_exp(segments.mean(log_ratio)))


def masked_reinforce(
    logprobs: Tensor, ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor
) -> Surrogate:
    """-r_t A_t log pi(y_t) without the tokens in low and high, [N]. The ratio has no gradient."""
    weight = ratio.masked_fill(low | high, 0.0)
    return Surrogate(-weight * advantages * logprobs, ratio, low, high)


def no_clip(ratio: Tensor) -> Tensor:
    """bool [N], all False: the clip mask of an objective that has no bound on that side."""
    return torch.zeros_like(ratio, dtype=torch.bool)
