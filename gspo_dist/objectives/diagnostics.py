"""Numbers that say whether a batch can teach: advantages, ratios, groups, lengths. Numpy arrays in, floats
out.

The entropy of the policy needs logits, so the learner gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gspo_dist.objectives.advantages import degenerate_group_share

__all__ = ["advantage_statistics", "degenerate_group_share", "length_by_outcome", "ratio_quantiles"]


def _vector(name: str, x: np.ndarray) -> np.ndarray:
    values = np.asarray(x)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be [R] with R >= 1: got {list(values.shape)}")
    return values


def advantage_statistics(advantages: np.ndarray) -> dict[str, float]:
    """Mean, population std, extremes, and the shares of positive, negative and zero advantages; [R]."""
    a = _vector("advantages", advantages).astype(np.float64)
    return {
        "advantage/mean": float(a.mean()),
        "advantage/std": float(a.std()),
        "advantage/min": float(a.min()),
        "advantage/max": float(a.max()),
        "advantage/positive_fraction": float((a > 0).mean()),
        "advantage/negative_fraction": float((a < 0).mean()),
        "advantage/zero_fraction": float((a == 0).mean()),
    }


def ratio_quantiles(
    ratio: np.ndarray, quantiles: Sequence[float] = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
) -> dict[str, float]:
    """Quantiles of the ratio, linear between order statistics; quantiles do not merge: give all values at
    once."""
    values = _vector("ratio", ratio).astype(np.float64)
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must lie in [0, 1]: got {list(quantiles)}")
    return {f"ratio/q{100 * q:g}": float(v) for q, v in zip(quantiles, np.quantile(values, quantiles))}


def length_by_outcome(lengths: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Mean completion length in tokens of correct and wrong rollouts (nan when there is none), and their
    share."""
    n, good = _vector("lengths", lengths).astype(np.float64), _vector("correct", correct)
    if good.shape != n.shape or good.dtype != np.bool_:
        raise ValueError(f"correct must be bool [R={n.size}]: got {good.dtype} {list(good.shape)}")
    return {
        "rollout/length_correct_tokens": float(n[good].mean()) if good.any() else float("nan"),
        "rollout/length_wrong_tokens": float(n[~good].mean()) if not good.all() else float("nan"),
        "rollout/correct_fraction": float(good.mean()),
    }
