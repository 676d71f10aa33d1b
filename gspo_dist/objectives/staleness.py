"""Log-probs of an older policy: what their age does to the log ratio, kept apart from the mismatch.

A token's lag is how many optimiser steps the learner, at the start of its update, is ahead of the weights
that sampled the token. At lag 0 both sides are one policy, and D_t = old_logprobs - rollout_logprobs (learner
minus engine) is what engine and learner disagree about: mismatch (`mismatch`). At any other lag D_t is mostly
how far the policy has walked since then. That is staleness, and it must not be taken for the other.

What the walk does to a sequence of T tokens, when its steps are independent: log s ~ N(-k, 2k / T) at a KL of
k per token, so the mean moves like k and the spread like sqrt(k / T). GSPO's clip of 3e-4 is narrower than
either after a few optimiser steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.aggregate import Segments
from gspo_dist.objectives.offset import Clip

LAG = "staleness/log_ratio_mean/lag_"
"""Statistic of one lag: this with the lag's number after it."""

OWN_MEAN_FROM = 16
"""Sequences from which a micro-batch may be recentred by its own mean: the mean of S sequences also takes 1/S
of their spread out, which is noise worth removing only when S is not small.
"""


@dataclass(frozen=True)
class LagOffsets:
    """What recentring by age takes out of the log ratios: one offset for the tokens of each lag."""

    known: Mapping[int, float] = field(default_factory=dict)
    """Lag -> offset in nats, measured before. A lag that is not here has none taken out."""
    own: bool = False
    """Prefer the micro-batch's own mean of a lag that OWN_MEAN_FROM of its sequences hold. Only for the first
    mini-batch of a step: later that mean also contains what was learnt."""


@torch.no_grad()
def by_lag(
    values: Tensor, lags: Tensor, segments: Segments, known: list[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Lag -> (mean of the values [N] over each sequence's tokens of that lag, how many those are), both [S].

    known: the lags to look for, the same list on every context-parallel rank, because each costs a sum over
    the ranks. A sequence without a token of the lag has mean 0 and count 0.
    Example: values [1, 3, 5], lags [0, 0, 4] of one sequence give {0: ([2], [2]), 4: ([5], [1])}.
    """
    found = {}
    for lag in known:
        chosen = (lags == lag).to(values.dtype)
        count = segments.sum(chosen)
        found[lag] = (segments.sum(values * chosen) / count.clamp(min=1.0), count)
    return found


@torch.no_grad()
def offsets_by_lag(
    log_ratio: Tensor, lags: Tensor, segments: Segments, known: list[int], offsets: LagOffsets
) -> Tensor:
    """[N]: the offset of each token's lag. Sequences weigh equally, as in GSPO.

    known: all lags of the micro-batch, as `by_lag` takes them. With one lag and `own` this is the mean over
    sequences of their mean log ratio, on every token.
    """
    out = torch.zeros_like(log_ratio)
    found = by_lag(log_ratio, lags, segments, known) if offsets.own else {}
    for lag in known:
        offset = offsets.known.get(lag, 0.0)
        if lag in found:
            means, counts = found[lag]
            holds = counts > 0
            if int(holds.sum()) >= OWN_MEAN_FROM:
                offset = float(means[holds].mean())
        out = out.masked_fill(lags == lag, offset)
    return out


@torch.no_grad()
def staleness_stats(
    log_ratio: Tensor,
    lags: Tensor,
    segments: Segments,
    known: list[int],
    *,
    clip: Clip | None,
    sequence_level: bool,
) -> dict[str, Stat]:
    """What the age of the data does to the log ratio before any learning, as statistics that merge.

    log_ratio [N]: the learner at the start of the update minus the engine when it sampled, in nats. lags [N]
    int. known: all lags of the micro-batch, as `by_lag` takes them. clip, sequence_level: of the objective,
    to say what lies outside of its clip already.
    """
    delta = log_ratio.detach().double()
    share = segments.expand(1.0 / segments.lengths.double())
    stale = lags != 0
    mean = segments.mean(delta)
    # Sequences with a stale token. The weight of each token makes every sequence count once, over all ranks.
    touched = share * segments.expand((segments.sum(stale.double()) > 0).double())
    stats = {
        "staleness/token_fraction": Stat.mean(stale),
        "staleness/log_ratio_mean": Stat.mean(segments.expand(mean), touched),
        "staleness/log_ratio_square": Stat.mean(segments.expand(mean).square(), touched),
    }
    for lag, (means, counts) in by_lag(delta, lags, segments, [k for k in known if k]).items():
        once = (lags == lag).double() / segments.expand(counts.clamp(min=1.0))
        stats[f"{LAG}{lag}"] = Stat.mean(segments.expand(means), once)
    if clip is not None:
        judged, weight = (segments.expand(mean), share) if sequence_level else (delta, torch.ones_like(delta))
        outside = (judged < clip.log_low) | (judged > clip.log_high)
        stats["staleness/outside_clip_fraction"] = Stat.mean(outside.double(), weight)
    return stats
