"""The pieces that the objectives share: a bounded exponential, the sign-aware clip, and what a surrogate
returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_dist.objectives.segments import Segments

# exp(20) = 4.9e8: finite in float32 and beyond any ratio that still carries information. Outside, the
# gradient is 0.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, eq=False)
class Surrogate:
    """An objective before aggregation. N trained tokens.

    loss: [N], to minimise, with gradient; ratio: [N], the ratio that was clipped (constant in a sequence for
    sequence-level objectives); clipped_low, clipped_high: bool [N], the tokens on which that bound binds.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of log_ratio held in [-20, 20], so that one broken token cannot make the loss infinite."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def binding(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away: below 1 - clip_low with A < 0, above 1 + clip_high with A >
    0."""
    return (ratio < 1.0 - clip_low) & (advantages < 0), (ratio > 1.0 + clip_high) & (advantages > 0)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), written as the ratio with its binding bound put
    in."""
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


def no_clip(ratio: Tensor) -> Tensor:
    """A clip mask of an objective that has no bound on that side."""
    return torch.zeros_like(ratio, dtype=torch.bool)
