"""Numbers that say whether the policy can learn from a batch: of its advantages, ratios and lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _vector(name: str, x: np.ndarray) -> np.ndarray:
    values = np.asarray(x)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be [R] with R >= 1: got {list(values.shape)}")
    return values


def advantage_statistics(advantages: np.ndarray) -> dict[str, float]:
    """Of advantages [R]: mean, population std, extremes, and the shares above, below and at 0."""
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
    """Quantiles of the ratio, [R], linear between order statistics.

    Quantiles of parts do not merge, so give the values of all ranks at once. Raises ValueError for a quantile
    outside [0, 1].
    """
    values = _vector("ratio", ratio).astype(np.float64)
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must lie in [0, 1]: got {list(quantiles)}")
    found = np.quantile(values, quantiles)
    return {f"ratio/q{100 * q:g}": float(value) for q, value in zip(quantiles, found, strict=True)}


def length_by_outcome(lengths: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Mean completion length in tokens of correct and of wrong rollouts, and the share of correct ones.

    lengths: [R], in tokens. correct: bool [R]. A mean over no rollout is nan.
    Raises ValueError when `correct` is not bool or has another length.
    """
    n, good = _vector("lengths", lengths).astype(np.float64), _vector("correct", correct)
    if good.shape != n.shape or good.dtype != np.bool_:
        raise ValueError(f"correct must be bool [R={n.size}]: got {good.dtype} {list(good.shape)}")
    return {
        "rollout/length_correct_tokens": float(n[good].mean()) if good.any() else float("nan"),
        "rollout/length_wrong_tokens": float(n[~good].mean()) if not good.all() else float("nan"),
        "rollout/correct_fraction": float(good.mean()),
    }
