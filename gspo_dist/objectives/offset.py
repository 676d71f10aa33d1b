"""The contract of the engine's log-probs: measure the offset that the mismatch puts on the log ratio, and act
on it.

With old_logprobs taken from the engine, E[log pi - log mu] = -KL(mu || pi) per token, so before any learning
the mean log ratio of a sequence stands at -KL, which at 1.5e-3 is five GSPO clip widths below 1:
negative-advantage sequences are clipped away, positive ones never. The offset is what has to come out. No
torch here.

What recentring does not do: the spread between sequences, sqrt(2 KL / length) for independent tokens,
remains, so a part of the sequences on each side stays clipped (`clip_width.expected_clip_shares` gives it);
the balance between signs is restored, the lost gradient is not. Only recomputed old_logprobs, or less
mismatch (R3), give that back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gspo_dist.checks import choose
from gspo_dist.objectives.specs import GUARD_ACTIONS, OFFSET_ESTIMATORS


def _bounds(clip_low: float, clip_high: float, log_space: bool) -> tuple[float, float]:
    """The clip bounds as logarithms; log_space: they are given as such (gmpo)."""
    if log_space and 0 < clip_low < math.inf and 0 < clip_high < math.inf:
        return -clip_low, clip_high
    if not 0 < clip_low <= 1 or not 0 < clip_high < math.inf:
        raise ValueError(
            f"clip_low must lie in (0, 1] and clip_high be > 0: got clip_low={clip_low}, "
            f"clip_high={clip_high}"
        )
    return (math.log1p(-clip_low) if clip_low < 1 else -math.inf), math.log1p(clip_high)


def offset_in_clip_widths(
    mean_log_ratio: float, clip_low: float, clip_high: float, *, log_space: bool = False
) -> float:
    """The offset divided by the distance from ratio 1 to the bound on its side, both as logarithms; signed.

    -1 means that a sequence of average mismatch sits exactly on the lower bound before any learning.
    Example: mean_log_ratio -1.5e-3 with clip_low 3e-4 is -4.9993 widths.
    """
    if not math.isfinite(mean_log_ratio):
        raise ValueError(f"mean_log_ratio must be finite: got {mean_log_ratio}")
    low, high = _bounds(clip_low, clip_high, log_space)
    return mean_log_ratio / (-low if mean_log_ratio < 0 else high)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def expected_clip_shares(
    mean: float, std: float, clip_low: float, clip_high: float, *, log_space: bool = False
) -> tuple[float, float]:
    """(share of negative-advantage sequences clipped, share of positive-advantage ones) if log s ~ N(mean,
    std^2).

    P(log s < log(1 - clip_low)) and P(log s > log(1 + clip_high)).
    """
    if not std > 0:
        raise ValueError(f"std must be > 0: got {std}")
    low, high = _bounds(clip_low, clip_high, log_space)
    return _normal_cdf((low - mean) / std), _normal_cdf((mean - high) / std)


def gaussian_log_ratio(kl: float, tokens: int) -> tuple[float, float]:
    """Mean and std of the mean log ratio of a sequence of `tokens` tokens at a per-token mismatch of `kl`
    nats.

    Model: token log ratios independent N(-kl, 2 kl), the only Gaussian for which the ratio has mean 1 under
    the engine's distribution. So log s ~ N(-kl, 2 kl / tokens).
    Example: kl 1.5e-3, 2,048 tokens, clip_low 3e-4: 84% of the negative-advantage sequences are clipped
    before any learning; with the offset removed, 40%, because the spread 1.2e-3 stays.
    """
    if not kl > 0 or tokens < 1:
        raise ValueError(f"kl must be > 0 and tokens >= 1: got kl={kl}, tokens={tokens}")
    return -kl, math.sqrt(2.0 * kl / tokens)


@dataclass(frozen=True)
class OffsetEstimate:
    """offset: mean log ratio, nats; standard_error of it (inf when unknown); spread: standard deviation
    between sequences (n - 1); sequences: how many were measured."""

    offset: float
    standard_error: float
    spread: float
    sequences: int


def batch_offset(sequence_log_ratios: Iterable[float], *, population: int | None = None) -> OffsetEstimate:
    """The mean over sequences of their mean log ratio, in the first mini-batch, where the policy is still the
    old one.

    Bias: none for the expected offset, sequences weighing equally as in GSPO. Applied to the S sequences that
    it was measured on, it leaves their mean exactly 0 and their variance too small by the factor (S-1)/S, so
    the clip share of those sequences is too low by O(1/S). Measured in a later mini-batch it would contain
    learning: do not. population: when the S are a random subset of that many, the standard error shrinks by
    sqrt(1 - S/population).
    """
    values = [float(v) for v in sequence_log_ratios]
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(
            f"sequence_log_ratios must be finite numbers, at least one: got {len(values)} values"
        )
    return _from_sums(sum(values), math.fsum(v * v for v in values), len(values), population, values)


def offset_from_moments(mean: float, square: float, sequences: int) -> OffsetEstimate:
    """The same from merged statistics: mean and mean square over `sequences` of the mean log ratio."""
    if sequences < 1 or not math.isfinite(mean) or not math.isfinite(square):
        raise ValueError(f"moments must be finite, over >= 1 sequences: got {mean}, {square}, {sequences}")
    return _from_sums(mean * sequences, square * sequences, sequences, None, None)


def _from_sums(
    total: float, square: float, count: int, population: int | None, values: list[float] | None
) -> OffsetEstimate:
    mean = total / count
    if population is not None and population < count:
        raise ValueError(f"population must be >= the {count} sequences measured: got {population}")
    if count == 1:
        return OffsetEstimate(mean, 0.0 if population == 1 else math.inf, math.nan, 1)
    # Two passes when the values are at hand: the spread is far below the offset.
    squares = math.fsum((v - mean) ** 2 for v in values) if values else max(square - count * mean * mean, 0.0)
    spread = math.sqrt(squares / (count - 1))
    finite = 1.0 if population is None else 1.0 - count / population
    return OffsetEstimate(mean, spread * math.sqrt(finite / count), spread, count)


def choose_subset(sequences: int, fraction: float, seed: int) -> list[int]:
    """Sorted indices of a random subset without replacement: round(fraction * sequences), at least 2 if there
    are 2."""
    if sequences < 1 or not 0 < fraction <= 1:
        raise ValueError(f"sequences must be >= 1 and fraction in (0, 1]: got {sequences} and {fraction}")
    size = min(sequences, max(2, round(fraction * sequences)))
    return sorted(random.Random(seed).sample(range(sequences), size))


def subset_offset(
    learner_logprobs: Any, rollout_logprobs: Any, segments: Any, *, population: int | None = None
) -> OffsetEstimate:
    """The offset from an exact recomputation on a random subset of the batch: unbiased, with its standard
    error.

    learner_logprobs, rollout_logprobs [N] and segments: trained tokens of the subset's sequences; population:
    the number of sequences that it was drawn from.
    """
    means = segments.mean((learner_logprobs - rollout_logprobs).detach())
    return batch_offset(means.tolist(), population=population)


class EmaOffset:
    """Running mean of the offset over steps, corrected for its start from nothing.

    m_n = sum_k w_k x_{n-k}, w_k = (1 - d) d^k / (1 - d^n). Bias: none for a constant offset, from the first
    step; an offset that moves by v per step is followed with the lag v (d / (1 - d) - n d^n / (1 - d^n)), 9 v
    at d = .9. Standard error: sqrt(sum_k w_k^2 se_{n-k}^2), steps taken as independent.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1): got {decay}")
        self.decay, self.steps, self._sum, self._variance = decay, 0, 0.0, 0.0

    def update(self, measured: OffsetEstimate) -> OffsetEstimate:
        """Takes in one step's measurement and returns the smoothed one."""
        d = self.decay
        self.steps += 1
        self._sum = d * self._sum + (1 - d) * measured.offset
        self._variance = d * d * self._variance + (1 - d) ** 2 * measured.standard_error**2
        weight = 1 - d**self.steps
        error = math.sqrt(self._variance) / weight
        return OffsetEstimate(self._sum / weight, error, measured.spread, measured.sequences)

    def state_dict(self) -> dict[str, float]:
        return {"decay": self.decay, "steps": self.steps, "sum": self._sum, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if state["decay"] != self.decay:
            raise ValueError(
                f"ema decay must be that of the saved state: got {self.decay}, saved {state['decay']}"
            )
        self.steps, self._sum, self._variance = int(state["steps"]), state["sum"], state["variance"]


@dataclass(frozen=True)
class GuardSettings:
    """action: off | warn | recentre | recompute, taken while the guard is active. It becomes active when the
    offset reaches `threshold` clip widths on either side and exceeds `significance` standard errors; it is
    released below `release` widths (None: half of the threshold), so that it does not flicker. log_space: the
    clip is on the log ratio (gmpo)."""

    clip_low: float
    clip_high: float
    action: str = "warn"
    threshold: float = 1.0
    release: float | None = None
    significance: float = 2.0
    estimator: str = "batch"
    ema_decay: float = 0.9
    log_space: bool = False

    def __post_init__(self) -> None:
        choose("guard.action", self.action, GUARD_ACTIONS)
        choose("guard.estimator", self.estimator, OFFSET_ESTIMATORS)
        offset_in_clip_widths(0.0, self.clip_low, self.clip_high, log_space=self.log_space)
        if not 0 <= self.release_at <= self.threshold or not math.isfinite(self.threshold):
            raise ValueError(
                f"guard.release must lie in [0, threshold]: got release={self.release_at}, "
                f"threshold={self.threshold}"
            )
        if not self.significance >= 0:
            raise ValueError(f"guard.significance must be >= 0: got {self.significance}")

    @property
    def release_at(self) -> float:
        return self.threshold / 2 if self.release is None else self.release


@dataclass(frozen=True)
class GuardDecision:
    """What to do with this step. action: none | warn | recentre | recompute; offset: to subtract from the log
    ratios (0 unless recentre); clip_widths: signed size of the offset; changed: the guard switched on or off
    just now."""

    action: str
    offset: float
    clip_widths: float
    changed: bool
    reason: str


class MismatchGuard:
    """Watches the offset, one measurement a step, and decides; its state can be saved and restored.

    Example: clip 3e-4 / 4e-4, action recentre, offset -1.5e-3: five widths, so the decision is to subtract
    -1.5e-3.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings, self.active = settings, False
        self.ema = EmaOffset(settings.ema_decay)

    def observe(self, measured: OffsetEstimate) -> GuardDecision:
        """The decision on one step's measured offset; with the estimator ema, on the running mean."""
        s = self.settings
        estimate = self.ema.update(measured) if s.estimator == "ema" else measured
        widths = offset_in_clip_widths(estimate.offset, s.clip_low, s.clip_high, log_space=s.log_space)
        was_active = self.active
        significant = abs(estimate.offset) > s.significance * estimate.standard_error
        if was_active:
            self.active = abs(widths) >= s.release_at
        else:
            self.active = abs(widths) >= s.threshold and significant
        changed = self.active != was_active
        if s.action == "off" or not self.active:
            return GuardDecision("none", 0.0, widths, changed, self._reason(estimate, widths, significant))
        offset = estimate.offset if s.action == "recentre" else 0.0
        return GuardDecision(s.action, offset, widths, changed, self._reason(estimate, widths, significant))

    def _reason(self, estimate: OffsetEstimate, widths: float, significant: bool) -> str:
        s = self.settings
        text = (
            f"mean log ratio {estimate.offset:+.3g} +- {estimate.standard_error:.2g} is {widths:+.2f} clip "
            f"widths ({'active' if self.active else 'inactive'}: from {s.threshold:g}, until below "
            f"{s.release_at:g})"
        )
        if not self.active:
            return (
                text
                if significant or abs(widths) < s.threshold
                else f"{text}; within {s.significance:g} errors of 0"
            )
        if estimate.spread > 0:
            now = expected_clip_shares(
                estimate.offset, estimate.spread, s.clip_low, s.clip_high, log_space=s.log_space
            )
            after = expected_clip_shares(0.0, estimate.spread, s.clip_low, s.clip_high, log_space=s.log_space)
            text += (
                f"; clipped before any learning: {now[0]:.0%} of negative-, {now[1]:.0%} of "
                f"positive-advantage sequences; recentred: {after[0]:.0%} and {after[1]:.0%}"
            )
        return text

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.active = bool(state["active"])
        self.ema.load_state_dict(state["ema"])
