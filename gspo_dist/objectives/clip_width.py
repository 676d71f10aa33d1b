"""How far a mean log ratio stands from the clip bounds, and which share of sequences that clips; no torch."""

from __future__ import annotations

import math


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
