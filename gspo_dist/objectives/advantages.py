"""From the rewards of a batch of groups to one advantage for each of its R rollouts, in float64."""

from __future__ import annotations

import numpy as np

from gspo_dist.checks import choose
from gspo_dist.objectives.specs import ADVANTAGES


def group_advantages(
    rewards: np.ndarray, group_ids: np.ndarray, kind: str, *, eps: float = 1e-6
) -> np.ndarray:
    """One advantage per rollout, float64 [R].

    group_std      (r - mean) / (std + eps)         GRPO, GSPO: arXiv 2402.03300, 2507.18071 eq 3
    group_mean     r - mean                         Dr. GRPO, MiniRL: arXiv 2503.20783, 2512.01374
    leave_one_out  r - mean of the others,          RLOO: arXiv 2402.14740
                   which is G/(G-1) (r - mean)
    none           r

    rewards: finite numbers [R]. group_ids: [R], in any order. Rollouts with the same id are siblings.

    std divides by G, because the papers write std({r_1..r_G}), the deviation of the group itself. The
    advantages of a group then have mean square 1, whatever G is. An implementation that divides by G - 1, as
    torch.std does, gets advantages smaller by sqrt((G-1)/G), which is 3% at G = 16.

    A group of one, or of equal rewards, gets exactly 0 from the first three kinds.

    Example: one group has the rewards 1, 0, 0, 0. group_mean gives 0.75, -0.25, -0.25, -0.25, and
    leave_one_out gives 1, -1/3, -1/3, -1/3.

    Raises ValueError for an unknown kind, a negative eps, another shape, or a reward that is not finite.
    """
    choose("advantage", kind, ADVANTAGES)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0: got {eps}")
    r, inverse, groups = _by_group(rewards, group_ids)
    if kind == "none":
        return r
    size = np.bincount(inverse, minlength=groups)
    mean = np.bincount(inverse, r, groups) / size
    # Equality is tested on the rewards: a deviation that is only rounding would be blown up to 1 below.
    centred = np.where(_degenerate(r, inverse, groups)[inverse], 0.0, r - mean[inverse])
    if kind == "leave_one_out":
        others = np.maximum(size - 1, 1)
        centred = centred * (size / others)[inverse]
    elif kind == "group_std":
        square = np.bincount(inverse, centred * centred, groups)
        deviation = np.sqrt(square / size) + eps
        centred = centred / np.where(deviation > 0, deviation, 1.0)[inverse]
    return centred


def degenerate_group_share(rewards: np.ndarray, group_ids: np.ndarray) -> float:
    """Share of groups whose rewards are all equal, as in a group of one. They teach nothing."""
    return float(_degenerate(*_by_group(rewards, group_ids)).mean())


def _by_group(rewards: np.ndarray, group_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Rewards as float64 [R], the group of each as an index [R], and the number of groups."""
    r, ids = np.asarray(rewards).astype(np.float64), np.asarray(group_ids)
    if r.ndim != 1 or r.size == 0:
        raise ValueError(f"rewards must be [R] with R >= 1: got {list(r.shape)}")
    if ids.shape != r.shape:
        raise ValueError(f"group_ids must be [R={r.size}], one per reward: got {list(ids.shape)}")
    if not np.isfinite(r).all():
        at = int(np.flatnonzero(~np.isfinite(r))[0])
        raise ValueError(f"rewards must be finite: got {r[at]} for rollout {at} of group {ids[at]}")
    known, inverse = np.unique(ids, return_inverse=True)
    return r, inverse, len(known)


def _degenerate(r: np.ndarray, inverse: np.ndarray, groups: int) -> np.ndarray:
    """bool [groups]: whether all rewards of the group are equal."""
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, inverse, r)
    np.maximum.at(high, inverse, r)
    return low == high
