"""The policy objectives, each as a loss per trained token.

All of them take logprobs [N] (with gradient), old_logprobs [N], advantages [N] and segments (N tokens of S
sequences). Log-probs are in nats. In the formulas r_t is the token ratio exp(logprobs - old_logprobs), A_t
the advantage, |y| the number of trained tokens of the sequence, and sg the stopped gradient. A sequence-level
objective gives every token of a sequence the same value: `sequence_mean` then returns exactly the value of
the paper, and context-parallel ranks can add up their parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_dist.objectives.aggregate import Segments
from gspo_dist.objectives.second_moment import trust_region
from gspo_dist.objectives.surrogate import (
    LEAST_REST,
    LOG_RATIO_LIMIT,
    Surrogate,
    binding,
    bounded_exp,
    clipped_surrogate,
    geometric_mean,
    masked_reinforce,
    no_clip,
    outside,
    require_constant,
)

# --- one value per sequence: GSPO, LUSPO, VESPO, GMPO ---


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """GSPO, arXiv 2507.18071 eq 5-7: min(s A, clip(s) A), s = exp(1/|y| sum_t (log pi - log pi_old)).

    Gradient where unclipped (eq 10): s A / |y| sum_t grad log pi(y_t).
    Raises ValueError if A varies within a sequence.
    """
    require_constant(advantages, segments, "gspo")
    ratio = geometric_mean(logprobs - old_logprobs, segments)
    return clipped_surrogate(ratio, advantages, clip_low, clip_high)


def gspo_token(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """GSPO-token, arXiv 2507.18071 eq 13-14: min(s_t A_t, clip(s_t) A_t), s_t = sg[s] pi(y_t) / sg[pi(y_t)].

    Equal to GSPO in value and gradient when A_t is constant in the sequence (eq 17); takes A_t per token.
    """
    # exp(logprobs - logprobs.detach()) is 1 in value and passes the gradient of each token's own log-prob.
    sequence = geometric_mean((logprobs - old_logprobs).detach(), segments)
    ratio = sequence * torch.exp(logprobs - logprobs.detach())
    return clipped_surrogate(ratio, advantages, clip_low, clip_high)


def luspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """LUSPO, arXiv 2602.05261: |y| min(s A, clip(s) A) with GSPO's s. `sequence_sum` makes the factor |y|.

    GSPO divides the gradient of a token by the length of its sequence, and so moves a long answer less. The
    factor |y| takes that back: the gradient where unclipped is s A sum_t grad log pi(y_t).
    Raises ValueError if A varies within a sequence.
    """
    require_constant(advantages, segments, "luspo")
    ratio = geometric_mean(logprobs - old_logprobs, segments)
    return clipped_surrogate(ratio, advantages, clip_low, clip_high)


def vespo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    k_positive: float,
    lambda_positive: float,
    k_negative: float,
    lambda_negative: float,
) -> Surrogate:
    """VESPO, arXiv 2602.10693: sg[phi(W)] A log pi(y), phi(W) = W^k exp(lambda (1 - W)), k and lambda by A.

    W = exp(sum_t (log pi - log pi_old)) is the whole sequence's probability ratio, no geometric mean. phi is
    1 at W = 1, has its maximum at W = k / lambda, and falls to 0 on both sides. With pi_old from the engine
    it also weighs the mismatch.
    Raises ValueError if A varies within a sequence.
    """
    require_constant(advantages, segments, "vespo")
    total = segments.sum((logprobs - old_logprobs).detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_ratio = segments.expand(total)
    ratio, positive = log_ratio.exp(), advantages >= 0
    k = torch.full_like(ratio, k_negative).masked_fill(positive, k_positive)
    decay = torch.full_like(ratio, lambda_negative).masked_fill(positive, lambda_positive)
    # In the logarithm: W^k alone would overflow float32 where the product is 0.
    weight = (k * log_ratio + decay * (1.0 - ratio)).exp()
    return Surrogate(-weight * advantages * logprobs, ratio, no_clip(ratio), no_clip(ratio))


def gmpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """GMPO, arXiv 2507.20673: A exp(1/|y| sum_t l_t), a geometric mean of token ratios clipped in log space.

    l_t = min(log r_t, clip_high) if A > 0, else max(log r_t, -clip_low): only the side that binds is clipped.
    A clipped token loses its own gradient only.
    Raises ValueError if A varies within a sequence.
    """
    require_constant(advantages, segments, "gmpo")
    return _clipped_geometric_mean(logprobs - old_logprobs, advantages, segments, clip_low, clip_high)


def _clipped_geometric_mean(
    log_ratio: Tensor, advantages: Tensor, segments: Segments, clip_low: float, clip_high: float
) -> Surrogate:
    low, high = outside(log_ratio, advantages, clip_low, clip_high)
    used = log_ratio.masked_fill(low, -clip_low).masked_fill(high, clip_high)
    ratio = geometric_mean(used, segments)
    return Surrogate(-ratio * advantages, ratio.detach(), low, high)


def rspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
    shift_floor: float,
    router_shift: Tensor,
) -> Surrogate:
    """RSPO, arXiv 2510.23027: GMPO with the token ratio r_t sg[max(gamma_t, shift_floor)].

    gamma_t = exp(-mean over MoE layers and the old policy's experts of |log p - log p_old|) of the routers'
    probabilities p, `router_shift` [N] (routing/scores.py). It takes part in the clip, so that a token whose
    experts have moved gains less where A > 0 and is clipped sooner where A < 0. Without the stopped gradient
    training collapses (the paper). Public sources differ in two points: whether gamma enters before the clip
    or after it, and whether layers are averaged or multiplied. Here it is before, and averaged.
    Raises ValueError if A varies within a sequence.
    """
    require_constant(advantages, segments, "rspo")
    # shift_floor may be 0, whose logarithm is -inf. No ratio of a trained token should become that.
    weight = router_shift.detach().to(logprobs.dtype).clamp(min=max(shift_floor, LEAST_REST)).log()
    log_ratio = logprobs + weight - old_logprobs
    return _clipped_geometric_mean(log_ratio, advantages, segments, clip_low, clip_high)


# --- token ratios: GRPO and its kin ---


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Surrogate:
    """GRPO, arXiv 2402.03300 and 2507.18071 eq 2-3: min(r_t A_t, clip(r_t) A_t).

    dual_clip c (arXiv 1912.09729): for A_t < 0 the term is max(that, c A_t), so that a ratio above c has no
    gradient. Such tokens count as clipped_high.
    """
    ratio = bounded_exp(logprobs - old_logprobs)
    plain = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    if dual_clip is None:
        return plain
    dual = (ratio > dual_clip) & (advantages < 0)
    loss = torch.where(dual, -dual_clip * advantages, plain.loss)
    return Surrogate(loss, plain.ratio, plain.clipped_low, plain.clipped_high | dual)


def dapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """DAPO, arXiv 2503.14476: GRPO's term with the upper bound raised, aggregated by `token_mean`."""
    return clipped_surrogate(bounded_exp(logprobs - old_logprobs), advantages, clip_low, clip_high)


def dr_grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """Dr. GRPO, arXiv 2503.20783: GRPO's term with A = R - mean R, aggregated by `constant_length`."""
    return clipped_surrogate(bounded_exp(logprobs - old_logprobs), advantages, clip_low, clip_high)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """CISPO, arXiv 2506.13585: sg[clip(r_t, 1 - clip_low, 1 + clip_high)] A_t log pi(y_t).

    The weight is clipped, never the gradient, whatever the sign of A_t, and clipped tokens are counted
    likewise. The paper switches the lower bound off (clip_low = 1) and tunes the upper one. The default caps
    the weight at 5.
    """
    ratio = bounded_exp((logprobs - old_logprobs).detach())
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return Surrogate(-weight * advantages * logprobs, ratio, ratio < 1.0 - clip_low, ratio > 1.0 + clip_high)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    tau_positive: float,
    tau_negative: float,
) -> Surrogate:
    """SAPO, arXiv 2511.20347: f(r_t) A_t, f(r) = 4/tau sigmoid(tau (r - 1)), tau by the sign of A_t.

    f'(r) = sech^2(tau (r - 1) / 2) is a soft gate in place of the clip, 1 at r = 1; nothing is clipped.
    """
    ratio = bounded_exp(logprobs - old_logprobs)
    tau = torch.full_like(ratio, tau_negative).masked_fill(advantages > 0, tau_positive)
    gate = 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0))
    return Surrogate(-gate * advantages, ratio.detach(), no_clip(ratio), no_clip(ratio))


def minirl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """MiniRL, arXiv 2512.01374: M_t sg[r_t] A_t log pi(y_t); M_t = 0 where the clip binds, else 1.

    The truncated weight pi_old / mu of the paper is the correction `token_truncate` (cap 5), which
    `Objective.loss` multiplies in.
    """
    ratio = bounded_exp((logprobs - old_logprobs).detach())
    low, high = binding(ratio, advantages, clip_low, clip_high)
    return masked_reinforce(logprobs, ratio, advantages, low, high)


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, segments: Segments) -> Surrogate:
    """REINFORCE with importance weight: sg[r_t] A_t log pi(y_t). arXiv 2402.14740 with leave_one_out."""
    ratio = bounded_exp((logprobs - old_logprobs).detach())
    return Surrogate(-ratio * advantages * logprobs, ratio, no_clip(ratio), no_clip(ratio))


# --- trust regions that are no ratio: DPPO, M2PO ---


def dppo_tv(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    delta_low: float,
    delta_high: float,
) -> Surrogate:
    """DPPO-Binary-TV, arXiv 2602.04879: M_t sg[r_t] A_t log pi(y_t).

    M_t = 0 where A_t > 0 and pi - pi_old > delta_high, or A_t < 0 and pi - pi_old < -delta_low, else 1. These
    are probabilities of the sampled token: a rare token may change its ratio a lot. The paper's pi_old is the
    engine's.
    """
    moved = logprobs.detach().exp() - old_logprobs.exp()
    ratio = bounded_exp((logprobs - old_logprobs).detach())
    return masked_reinforce(logprobs, ratio, advantages, *outside(moved, advantages, delta_low, delta_high))


def dppo_kl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    delta_low: float,
    delta_high: float,
) -> Surrogate:
    """DPPO-Binary-KL, arXiv 2602.04879: as `dppo_tv`, by the KL of "this token or another", old from new.

    D = p log(p / q) + (1 - p) log((1 - p) / (1 - q)) with p = pi_old and q = pi of the sampled token. It
    counts as upwards where q > p.
    """
    current, old = logprobs.detach(), old_logprobs
    # expm1 keeps the digits of 1 - p where p is near 1.
    rest_old, rest = (-torch.expm1(x) for x in (old, current))
    divergence = old.exp() * (old - current) + rest_old * (
        rest_old.clamp(min=LEAST_REST).log() - rest.clamp(min=LEAST_REST).log()
    )
    moved = divergence * torch.sign(current - old)
    ratio = bounded_exp(current - old)
    return masked_reinforce(logprobs, ratio, advantages, *outside(moved, advantages, delta_low, delta_high))


def m2po(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    second_moment: float,
    second_moment_cut: float,
) -> Surrogate:
    """M2PO, arXiv 2510.01161 eq 5: M_t r_t A_t, in which M_t drops the tokens that moved most.

    second_moment_cut: the square of a log ratio above which a trust-region token is dropped, found over the
    whole mini-batch by `second_moment.cut`, so that the mask does not depend on how it is split.
    second_moment: the mean square that the kept ones may have. Tokens below it are always kept.
    Dropped tokens stay in the denominators (the paper's footnote 2).
    """
    if not second_moment_cut >= second_moment:
        raise ValueError(
            f"m2po keeps every token whose square is below second_moment={second_moment:g}: got the cut "
            f"{second_moment_cut:g}; find it with second_moment.cut"
        )
    log_ratio = logprobs - old_logprobs
    region = trust_region(log_ratio.detach(), advantages)
    dropped = region & (log_ratio.detach().double().square() > second_moment_cut)
    ratio = bounded_exp(log_ratio)
    loss = (-ratio * advantages).masked_fill(dropped, 0.0)
    return Surrogate(loss, ratio.detach(), dropped & (advantages < 0), dropped & (advantages > 0))


# --- centred ---


def score_centering(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    candidates: int,
    weight_cap: float | None,
    expected_score: Tensor,
) -> Surrogate:
    """Score centering, arXiv 2609.20807, on REINFORCE: A_t (w_t log pi(y_t) - C_t).

    C_t is the mean of w log pi over the engine's own distribution (`centering.expected_score`), with
    gradient: where engine and learner differ, no part of what is left pulls one to the other.
    candidates: the engine's likeliest tokens from which C_t was made.
    weight_cap c: w_t = sg[min(r_t, c)], for which old_logprobs must be the engine's. None: w_t = 1, and
    old_logprobs are for the statistics alone.
    """
    ratio = bounded_exp((logprobs - old_logprobs).detach())
    weight = torch.ones_like(ratio) if weight_cap is None else ratio.clamp(max=weight_cap)
    return Surrogate(
        -advantages * (weight * logprobs - expected_score), ratio, no_clip(ratio), no_clip(ratio)
    )
