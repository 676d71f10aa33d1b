"""How far engine log-probs move the sequence ratio off centre, and the guard that acts on it.

Standard library only.

With old_logprobs from the engine, E[log pi - log mu] = -KL(mu || pi) per token. Before any learning the mean
log ratio of a sequence therefore stands at -KL and not at 0. At KL 1.5e-3 that is five of GSPO's clip widths
below ratio 1: sequences with a negative advantage are clipped away, and those with a positive one never are.
This mean is the offset.

What recentring does not do: the spread between sequences stays (sqrt(2 KL / length) for independent tokens),
and so a part of the sequences on either side remains clipped. `Clip.expected_shares` gives that part. The
balance between the signs comes back, the lost gradient does not. Only recomputed old_logprobs, or less
mismatch (R3), give that back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gspo_dist.checks import at_least, choose
from gspo_dist.objectives.specs import GUARD_ACTIONS, OFFSET_ESTIMATORS

# --- the clip, as the unit in which offsets are measured ---


@dataclass(frozen=True)
class Clip:
    """The clip of an objective: two distances from ratio 1. Raises ValueError when one leaves no room."""

    low: float
    """Lower distance. The bound is 1 - low, or exp(-low) in log space. A ratio clip is off at 1."""
    high: float
    """Upper distance. The bound is 1 + high, or exp(high) in log space."""
    log_space: bool = False
    """Whether the distances are taken on the log ratio (gmpo)."""

    def __post_init__(self) -> None:
        # A ratio is never negative, so its lower distance is 1 at most. A log ratio has no such end.
        room = 0 < self.low < math.inf if self.log_space else 0 < self.low <= 1
        if not room or not 0 < self.high < math.inf:
            raise ValueError(
                f"clip_low must lie in (0, 1] (in log space: be > 0) and clip_high be > 0: "
                f"got clip_low={self.low}, clip_high={self.high}"
            )

    @property
    def log_low(self) -> float:
        """Logarithm of the lower bound, -inf when that is off."""
        if self.log_space:
            return -self.low
        return math.log1p(-self.low) if self.low < 1 else -math.inf

    @property
    def log_high(self) -> float:
        """Logarithm of the upper bound."""
        return self.high if self.log_space else math.log1p(self.high)

    def widths(self, mean_log_ratio: float) -> float:
        """An offset in widths: divided by the distance from ratio 1 to the bound on its side, in logarithms.

        -1 means that a sequence of average mismatch sits exactly on the lower bound before any learning.
        Example: -1.5e-3 with low 3e-4 is -4.9993 widths. Raises ValueError when the offset is not finite.
        """
        if not math.isfinite(mean_log_ratio):
            raise ValueError(f"mean_log_ratio must be finite: got {mean_log_ratio}")
        return mean_log_ratio / (-self.log_low if mean_log_ratio < 0 else self.log_high)

    def expected_shares(self, mean: float, std: float) -> tuple[float, float]:
        """Shares of the sequences that are clipped before any learning, if log s ~ N(mean, std^2).

        The first is P(log s < log lower bound), of the sequences with a negative advantage. The second is
        P(log s > log upper bound), of those with a positive one.

        Example: let the log ratios of tokens be independent and N(-k, 2k), the only Gaussian under which the
        ratio has mean 1. Then log s ~ N(-k, 2k / length). At k = 1.5e-3, 2,048 tokens and low 3e-4 the first
        share is 84%. With the offset taken out it is still 40%, because the spread of 1.2e-3 stays.
        """
        if not std > 0:
            raise ValueError(f"std must be > 0: got {std}")
        return _normal_cdf((self.log_low - mean) / std), _normal_cdf((mean - self.log_high) / std)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


# --- estimators of the offset ---


@dataclass(frozen=True)
class OffsetEstimate:
    """A measured offset and how far it can be trusted."""

    offset: float
    """Mean over sequences of the mean log ratio, in nats."""
    standard_error: float
    """Standard error of the offset, in nats. One sequence leaves it unknown, which is inf."""
    spread: float
    """Standard deviation between sequences, in nats, with n - 1. For one sequence it is nan."""
    sequences: int
    """How many sequences were measured."""


def batch_offset(sequence_log_ratios: Iterable[float], *, population: int | None = None) -> OffsetEstimate:
    """The offset from the mean log ratio of each sequence, at a time when the policy is still the old one.

    population: how many sequences these are a random subset of. It shrinks the standard error by
    sqrt(1 - S/population), to 0 when all of them were measured.

    Bias: none for the expected offset. Sequences weigh equally, as in GSPO. Taken out of the S sequences that
    it was measured on, the offset leaves their mean exactly 0 and their variance too small by the factor
    (S-1)/S. So their clip share is too low by O(1/S). Do not measure in a later mini-batch, whose mean also
    contains what was learnt.

    Raises ValueError when there is no value, one is not finite, or the population is smaller than the sample.
    """
    values = [float(v) for v in sequence_log_ratios]
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(
            f"sequence_log_ratios must be finite numbers, at least one: got {len(values)} values"
        )
    mean = sum(values) / len(values)
    # Two passes, because the spread is far below the offset.
    return _estimate(mean, math.fsum((v - mean) ** 2 for v in values), len(values), population)


def offset_from_moments(mean: float, square: float, sequences: int) -> OffsetEstimate:
    """The same from merged statistics: mean and mean square over `sequences` of the mean log ratio."""
    if sequences < 1 or not math.isfinite(mean) or not math.isfinite(square):
        raise ValueError(f"moments must be finite, over >= 1 sequences: got {mean}, {square}, {sequences}")
    # By way of the sums: the last digit of logged offsets depends on it.
    centre = mean * sequences / sequences
    return _estimate(centre, max(square * sequences - sequences * centre * centre, 0.0), sequences, None)


def _estimate(mean: float, squared_deviations: float, count: int, population: int | None) -> OffsetEstimate:
    if population is not None and population < count:
        raise ValueError(f"population must be >= the {count} sequences measured: got {population}")
    if count == 1:
        return OffsetEstimate(mean, 0.0 if population == 1 else math.inf, math.nan, 1)
    spread = math.sqrt(squared_deviations / (count - 1))
    unseen = 1.0 if population is None else 1.0 - count / population
    return OffsetEstimate(mean, spread * math.sqrt(unseen / count), spread, count)


def choose_subset(sequences: int, fraction: float, seed: int) -> list[int]:
    """Sorted indices of a random subset, drawn without replacement and fixed by the seed.

    Its size is round(fraction * sequences), but at least 2 where there are 2: one has no standard error.
    """
    if sequences < 1 or not 0 < fraction <= 1:
        raise ValueError(f"sequences must be >= 1 and fraction in (0, 1]: got {sequences} and {fraction}")
    size = min(sequences, max(2, round(fraction * sequences)))
    return sorted(random.Random(seed).sample(range(sequences), size))


class EmaOffset:
    """Running mean of the offset over steps, corrected for its start from nothing.

    m_n = sum_k w_k x_{n-k}, w_k = (1 - d) d^k / (1 - d^n). A constant offset has no bias, from the first step
    on. One that moves by v per step is followed with the lag v (d / (1 - d) - n d^n / (1 - d^n)), which tends
    to 9 v at d = 0.9. The standard error is sqrt(sum_k w_k^2 se_{n-k}^2), with steps taken as independent.
    """

    def __init__(self, decay: float) -> None:
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
        """What a checkpoint keeps."""
        return {"decay": self.decay, "steps": self.steps, "sum": self._sum, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues from a saved state. Raises ValueError when that was made with another decay."""
        if state["decay"] != self.decay:
            raise ValueError(
                f"ema decay must be that of the saved state: got {self.decay}, saved {state['decay']}"
            )
        self.steps, self._sum, self._variance = int(state["steps"]), state["sum"], state["variance"]


# --- the guard ---

RELEASE = 0.5
"""An active guard rests again below this share of the threshold. At 1 it would flicker around it."""
SIGNIFICANCE = 2.0
"""Standard errors by which an offset must differ from 0 before the guard acts: it must not act on noise."""


@dataclass(frozen=True)
class GuardConfig:
    """What to do when engine log-probs move the sequence ratio off centre (objectives/offset.py)."""

    action: str = "warn"
    """off | warn | recentre (take the offset out) | recompute (old_logprobs), past the threshold."""
    threshold: float = 1.0
    """The guard acts from this size of the first mini-batch's offset on, in clip widths on either side. Below
    half of it the guard rests again."""
    estimator: str = "batch"
    """batch | ema | subset.

    batch: each micro-batch of the first mini-batch takes its own mean. Where one of them holds fewer than 16
    sequences, all take the last step's. ema: the running mean over steps. subset: exact, on a random subset
    that is recomputed."""
    ema_decay: float = 0.9
    """Share of the running mean that a step keeps (estimator ema)."""
    subset_fraction: float = 0.0625
    """Share of sequences that is recomputed exactly (estimator subset)."""

    def __post_init__(self) -> None:
        choose("objective.guard.action", self.action, GUARD_ACTIONS)
        choose("objective.guard.estimator", self.estimator, OFFSET_ESTIMATORS)
        at_least("objective.guard.threshold", self.threshold, 0.0)
        if not 0 < self.subset_fraction <= 1:
            raise ValueError(f"objective.guard.subset_fraction must be in (0, 1]: got {self.subset_fraction}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"objective.guard.ema_decay must be in [0, 1): got {self.ema_decay}")

    @property
    def release(self) -> float:
        """Size of the offset, in clip widths, below which an active guard rests."""
        return RELEASE * self.threshold


@dataclass(frozen=True)
class GuardDecision:
    """What to do with this step."""

    action: str
    """none | warn | recentre | recompute."""
    offset: float
    """What to subtract from the log ratios, in nats. It is 0 unless the action is recentre."""
    changed: bool
    """Whether the guard began to act, or to rest, with this measurement."""
    reason: str
    """The measurement in words, for the log."""


class MismatchGuard:
    """Watches the offset, one measurement per step, and decides.

    Example: with the clip 3e-4 and 4e-4, an offset of -1.5e-3 is five widths below 0. The action recentre
    then subtracts -1.5e-3.
    """

    def __init__(self, config: GuardConfig, clip: Clip) -> None:
        self.config, self.clip, self.active = config, clip, False
        self.ema = EmaOffset(config.ema_decay)

    def observe(self, measured: OffsetEstimate) -> GuardDecision:
        """The decision on one step's measured offset, or on the running mean with the estimator ema.

        Call it once per step: every call counts as a step.
        """
        config = self.config
        estimate = self.ema.update(measured) if config.estimator == "ema" else measured
        widths = self.clip.widths(estimate.offset)
        was_active = self.active
        significant = abs(estimate.offset) > SIGNIFICANCE * estimate.standard_error
        if was_active:
            self.active = abs(widths) >= config.release
        else:
            self.active = abs(widths) >= config.threshold and significant
        changed, reason = self.active != was_active, self._reason(estimate, widths, significant)
        if config.action == "off" or not self.active:
            return GuardDecision("none", 0.0, changed, reason)
        offset = estimate.offset if config.action == "recentre" else 0.0
        return GuardDecision(config.action, offset, changed, reason)

    def _reason(self, estimate: OffsetEstimate, widths: float, significant: bool) -> str:
        threshold = self.config.threshold
        text = (
            f"mean log ratio {estimate.offset:+.3g} +- {estimate.standard_error:.2g} is {widths:+.2f} clip "
            f"widths ({'active' if self.active else 'inactive'}: from {threshold:g}, until below "
            f"{self.config.release:g})"
        )
        if not self.active:
            noise = abs(widths) >= threshold and not significant
            return f"{text}; within {SIGNIFICANCE:g} errors of 0" if noise else text
        if estimate.spread > 0:
            now = self.clip.expected_shares(estimate.offset, estimate.spread)
            after = self.clip.expected_shares(0.0, estimate.spread)
            text += (
                f"; clipped before any learning: {now[0]:.0%} of negative-, {now[1]:.0%} of "
                f"positive-advantage sequences; recentred: {after[0]:.0%} and {after[1]:.0%}"
            )
        return text

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"active": self.active, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state. Raises ValueError when that was made with another decay."""
        self.active = bool(state["active"])
        self.ema.load_state_dict(state["ema"])


def make_guard(config: GuardConfig, clip: Clip | None) -> MismatchGuard | None:
    """The guard of an objective with this clip. None when it is off, or has no clip to measure offsets in.

    Raises ValueError when the guard is to act (recentre, recompute) and the objective has no clip.
    """
    if clip is None and config.action in ("recentre", "recompute"):
        raise ValueError(
            f"objective.guard.action must be off or warn for an objective without a clip, in whose widths "
            f"the offset is measured: got {config.action}; give the objective clip_low and clip_high, or set "
            f"objective.guard.action=warn"
        )
    return None if clip is None or config.action == "off" else MismatchGuard(config, clip)
