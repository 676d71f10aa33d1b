"""Engine against learner on the trained tokens: corrections of the loss, and metrics that merge exactly.

D_t = old_logprobs - rollout_logprobs (learner minus engine, same weights), rho_t = exp(D_t); tokens are
samples of the engine. Exponents are capped at +-20.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.aggregate import Segments
from gspo_dist.objectives.losses import bounded_exp
from gspo_dist.objectives.offset import offset_in_clip_widths
from gspo_dist.objectives.specs import check_correction

__all__ = ["Correction", "correction", "mismatch_metrics", "mismatch_stats", "offset_in_clip_widths"]


class Correction(NamedTuple):
    """weights [N], multiplied into the loss of a token; keep bool [N], False: no policy loss. Both
    detached."""

    weights: Tensor
    keep: Tensor


@torch.no_grad()
def correction(
    name: str,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    low: float | None = None,
    high: float | None = None,
    logprobs: Tensor | None = None,
) -> Correction:
    """The correction `name` with bounds low, high (None: its default). All tensors [N].

    none               w = 1, all kept
    token_truncate     w = min(rho_t, high)                                     TIS
    token_mask         w = rho_t, kept where low <= rho_t <= high               IcePop, MIS
    sequence_truncate  w = min(prod rho, high)
    sequence_mask      w = prod rho, kept where low <= prod rho <= high
    geometric_reject   w = 1, sequence kept where low <= exp(mean D) <= high
    veto               w = 1, sequence dropped if any rho_t < low
    opsm               w = 1, sequence dropped if A < 0 and mean(rollout_logprobs - logprobs) > high
                       (arXiv 2512.02556); `logprobs` is the current policy, old_logprobs stand in when it is
                       None
    """
    bounds = check_correction(name, low=low, high=high)
    for field, x in (
        ("old_logprobs", old_logprobs),
        ("rollout_logprobs", rollout_logprobs),
        ("advantages", advantages),
    ):
        segments.check(x, field)
    delta = old_logprobs.detach() - rollout_logprobs
    ones, kept = torch.ones_like(delta), torch.ones_like(delta, dtype=torch.bool)
    if name == "none":
        return Correction(ones, kept)
    if name.startswith("token_"):
        ratio = bounded_exp(delta)
    elif name.startswith("sequence_"):
        ratio = segments.expand(bounded_exp(segments.sum(delta)))
    elif name == "geometric_reject":
        ratio = segments.expand(bounded_exp(segments.mean(delta)))
    if name.endswith("_truncate"):
        return Correction(ratio.clamp(max=bounds["high"]), kept)
    if name == "veto":
        broken = segments.sum((delta < math.log(max(bounds["low"], 1e-300))).to(delta.dtype))
        return Correction(ones, segments.expand(broken) == 0)
    if name == "opsm":
        current = old_logprobs.detach() if logprobs is None else logprobs.detach()
        segments.check(current, "logprobs")
        drift = segments.expand(segments.mean(rollout_logprobs - current))
        return Correction(ones, ~((advantages < 0) & (drift > bounds["high"])))
    inside = (ratio >= bounds["low"]) & (ratio <= bounds["high"])
    return Correction(ones if name == "geometric_reject" else ratio, inside)


@torch.no_grad()
def mismatch_stats(old_logprobs: Tensor, rollout_logprobs: Tensor, segments: Segments) -> dict[str, Stat]:
    """Sufficient statistics of the mismatch: merge them, then read them with `mismatch_metrics`."""
    segments.check(old_logprobs, "old_logprobs")
    segments.check(rollout_logprobs, "rollout_logprobs")
    # float64: the moments below are differences of nearly equal sums.
    p, q = old_logprobs.detach().double(), rollout_logprobs.detach().double()
    delta = p - q
    rho, size = bounded_exp(delta), delta.abs()
    share = segments.expand(1.0 / segments.lengths.double())
    mean_delta = segments.mean(delta)
    sequence_mean = segments.expand(mean_delta)
    product = segments.expand(bounded_exp(2.0 * mean_delta * segments.lengths))
    x, y = p.exp(), q.exp()
    return {
        "mismatch/kl": Stat.mean(-delta),
        "mismatch/k3_kl": Stat.mean(delta.clamp(-20.0, 20.0).expm1() - delta),
        "mismatch/chi2_token": Stat.mean(rho.square() - 1.0),
        "mismatch/chi2_sequence": Stat.mean(product - 1.0, share),
        "mismatch/log_ratio_mean": Stat.mean(sequence_mean, share),
        "mismatch/log_ratio_square": Stat.mean(sequence_mean.square(), share),
        "mismatch/ppl_ratio": Stat.mean(bounded_exp(-sequence_mean), share),
        "mismatch/extreme_fraction": Stat.mean(size > math.log(2.0)),
        "mismatch/abs_log_ratio_mean": Stat.mean(size),
        "mismatch/abs_log_ratio_max": Stat.max(size),
        "mismatch/token_mult_prob_error": Stat.mean(bounded_exp(size)),
        "mismatch/abs_prob_difference_mean": Stat.mean((x - y).abs()),
        "mismatch/abs_prob_difference_max": Stat.max((x - y).abs()),
        "moment/rho": Stat.mean(rho),
        "moment/rho_square": Stat.mean(rho.square()),
        "moment/p": Stat.mean(x),
        "moment/q": Stat.mean(y),
        "moment/pp": Stat.mean(x * x),
        "moment/qq": Stat.mean(y * y),
        "moment/pq": Stat.mean(x * y),
    }


def mismatch_metrics(stats: Mapping[str, Stat]) -> dict[str, float]:
    """The numbers to log, from merged `mismatch_stats`.

    kl: mean(-D), nats per token; k3_kl >= 0; extreme_fraction: P(max(rho, 1/rho) > 2), F(2) of arXiv
    2510.11370; ess: (mean rho)^2 / mean rho^2, 1 = no loss; log_ratio_mean, log_ratio_std: over sequences, of
    the mean D; ppl_ratio: mean of exp(-mean D); probability_correlation: Pearson, nan when either side is
    constant.
    """
    m = {name: stat.result() for name, stat in stats.items()}
    metrics = {k: v for k, v in m.items() if k.startswith("mismatch/") and k != "mismatch/log_ratio_square"}
    variance = m["mismatch/log_ratio_square"] - m["mismatch/log_ratio_mean"] ** 2
    metrics["mismatch/log_ratio_std"] = math.sqrt(max(variance, 0.0))
    metrics["mismatch/ess"] = m["moment/rho"] ** 2 / m["moment/rho_square"]
    var_p, var_q = m["moment/pp"] - m["moment/p"] ** 2, m["moment/qq"] - m["moment/q"] ** 2
    covariance = m["moment/pq"] - m["moment/p"] * m["moment/q"]
    defined = var_p > 1e-15 and var_q > 1e-15
    metrics["mismatch/probability_correlation"] = (
        covariance / math.sqrt(var_p * var_q) if defined else math.nan
    )
    return metrics
