"""Engine against learner on the trained tokens: corrections of the loss, and metrics that merge exactly.

D_t = old_logprobs - rollout_logprobs (learner minus engine, same weights) and rho_t = exp(D_t). Tokens are
samples of the engine. Exponents are held in [-20, 20].

A correction takes D_t whatever it comes from. Where the engine sampled with older weights it also holds how
far the policy has walked since (`staleness`). A weight then makes the decoupled objective: the clip stands
around the policy at the start of the update, and the weight says how likely that policy was to sample this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.aggregate import Segments
from gspo_dist.objectives.specs import check_correction
from gspo_dist.objectives.surrogate import LOG_RATIO_LIMIT, bounded_exp

# --- corrections ---


class Correction(NamedTuple):
    """What the mismatch does to the policy loss of each token. Both tensors are detached."""

    weights: Tensor
    """[N], multiplied into the loss of a token."""
    keep: Tensor
    """bool [N]; False takes the policy loss of a token away."""


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
) -> Correction | None:
    """The correction `name`, or None for "none". All tensors are [N]. A bound of None takes its default.

    token_truncate     w = min(rho_t, high)                                     TIS
    token_mask         w = rho_t, kept where low <= rho_t <= high               IcePop, MIS
    sequence_truncate  w = min(prod rho, high)
    sequence_mask      w = prod rho, kept where low <= prod rho <= high
    geometric_reject   w = 1, sequence kept where low <= exp(mean D) <= high
    geometric_truncate w = min(exp(mean D), high): the decoupled objective (arXiv 2505.24298) by sequence
    veto               w = 1, sequence dropped if any rho_t < low
    opsm               w = 1, sequence dropped if A < 0 and mean(rollout_logprobs - logprobs) > high

    opsm (arXiv 2512.02556) reads the current policy, `logprobs`. Where that is None, old_logprobs stand in.
    Raises ValueError for an unknown name, a bound that it does not have, or a tensor of another shape.
    """
    bounds = check_correction(name, low=low, high=high)
    segments.check(old_logprobs, "old_logprobs")
    segments.check(rollout_logprobs, "rollout_logprobs")
    segments.check(advantages, "advantages")
    delta = old_logprobs.detach() - rollout_logprobs
    ones, kept = torch.ones_like(delta), torch.ones_like(delta, dtype=torch.bool)
    if name == "none":
        return None
    if name == "veto":
        # A threshold of 0 vetoes nothing, and has no logarithm.
        broken = segments.sum((delta < math.log(max(bounds["low"], 1e-300))).to(delta.dtype))
        return Correction(ones, segments.expand(broken) == 0)
    if name == "opsm":
        current = old_logprobs.detach() if logprobs is None else logprobs.detach()
        segments.check(current, "logprobs")
        drift = segments.expand(segments.mean(rollout_logprobs - current))
        return Correction(ones, ~((advantages < 0) & (drift > bounds["high"])))
    if name.startswith("token_"):
        ratio = bounded_exp(delta)
    elif name.startswith("geometric_"):
        ratio = segments.expand(bounded_exp(segments.mean(delta)))
    else:
        ratio = segments.expand(bounded_exp(segments.sum(delta)))
    if name.endswith("_truncate"):
        return Correction(ratio.clamp(max=bounds["high"]), kept)
    inside = (ratio >= bounds["low"]) & (ratio <= bounds["high"])
    return Correction(ones if name == "geometric_reject" else ratio, inside)


# --- metrics ---


@torch.no_grad()
def mismatch_stats(old_logprobs: Tensor, rollout_logprobs: Tensor, segments: Segments) -> dict[str, Stat]:
    """Sufficient statistics of the mismatch, from [N] log-probs; `mismatch_metrics` reads their merge."""
    segments.check(old_logprobs, "old_logprobs")
    segments.check(rollout_logprobs, "rollout_logprobs")
    # float64: the moments below are differences of nearly equal sums.
    p, q = old_logprobs.detach().double(), rollout_logprobs.detach().double()
    delta = p - q
    rho, size = bounded_exp(delta), delta.abs()
    share = segments.expand(1.0 / segments.lengths.double())
    mean_delta = segments.mean(delta)
    sequence_mean = segments.expand(mean_delta)
    squared_product = segments.expand(bounded_exp(2.0 * mean_delta * segments.lengths))
    x, y = p.exp(), q.exp()
    return {
        "mismatch/kl": Stat.mean(-delta),
        "mismatch/k3_kl": Stat.mean(delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1() - delta),
        "mismatch/chi2_token": Stat.mean(rho.square() - 1.0),
        "mismatch/chi2_sequence": Stat.mean(squared_product - 1.0, share),
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
    """The numbers to log, from merged `mismatch_stats`. Log-probs and log ratios are in nats.

    kl                       mean of -D over tokens
    k3_kl                    mean of rho - 1 - D over tokens, never negative
    chi2_token               mean of rho^2 - 1 over tokens
    chi2_sequence            mean over sequences of (prod rho)^2 - 1
    log_ratio_mean, _std     over sequences, of the mean of D over their tokens
    ppl_ratio                mean over sequences of exp(-mean D)
    extreme_fraction         share of tokens with max(rho, 1/rho) > 2: F(2) of arXiv 2510.11370
    abs_log_ratio_*          mean and maximum of |D| over tokens
    token_mult_prob_error    mean of exp |D| over tokens
    abs_prob_difference_*    mean and maximum over tokens of the difference of the probabilities
    ess                      (mean rho)^2 / mean rho^2: the effective share of the tokens, 1 = no loss
    probability_correlation  Pearson, of the probabilities (nan when either side is constant)
    """
    m = {name: stat.result() for name, stat in stats.items()}
    metrics = {k: v for k, v in m.items() if k.startswith("mismatch/") and k != "mismatch/log_ratio_square"}
    variance = m["mismatch/log_ratio_square"] - m["mismatch/log_ratio_mean"] ** 2
    # Rounding can leave a variance of nothing just below 0.
    metrics["mismatch/log_ratio_std"] = math.sqrt(max(variance, 0.0))
    metrics["mismatch/ess"] = m["moment/rho"] ** 2 / m["moment/rho_square"]
    var_p, var_q = m["moment/pp"] - m["moment/p"] ** 2, m["moment/qq"] - m["moment/q"] ** 2
    covariance = m["moment/pq"] - m["moment/p"] * m["moment/q"]
    # 1e-15: a few roundings of probabilities of size 1. A variance below it is noise, and so is the quotient.
    defined = var_p > 1e-15 and var_q > 1e-15
    metrics["mismatch/probability_correlation"] = (
        covariance / math.sqrt(var_p * var_q) if defined else math.nan
    )
    return metrics
