"""From the rewards of a batch of groups to one advantage per rollout. R rollouts; float64 inside."""

from __future__ import annotations

import numpy as np
import torch

from gspo_dist.checks import choose
from gspo_dist.objectives.specs import ADVANTAGES

Array = np.ndarray | torch.Tensor


def group_advantages(
    rewards: Array, group_ids: Array, kind: str, *, std: str = "population", eps: float = 1e-6
) -> Array:
    """One advantage per rollout, [R], of the type given (numpy float64, or a tensor of the rewards' dtype).

    group_std      (r - mean) / (std + eps)         GRPO, GSPO: arXiv 2402.03300, 2507.18071 eq 3
    group_mean     r - mean                         Dr. GRPO, MiniRL
    leave_one_out  r - mean of the others           RLOO; = G/(G-1) (r - mean)
    none           r
    rewards: finite [R]; group_ids: [R], equal ids are siblings, in any order.
    std: the papers write std({r_1..r_G}), the deviation of the group itself, hence "population" (divide by
    G): the advantages of a group then have mean square 1 whatever G. "sample" (divide by G - 1), which
    implementations that call torch.std get, is smaller by sqrt((G-1)/G): 3% at G = 16.
    A group of one, or of equal rewards, gets exactly 0 from the first three kinds: equality is tested on the
    rewards, for a deviation that is only rounding would be blown up to 1.
    Example: rewards 1, 0, 0, 0 in one group: group_mean .75, -.25, -.25, -.25; leave_one_out 1, -1/3, -1/3,
    -1/3.
    """
    choose("advantage", kind, ADVANTAGES)
    choose("std", std, ("population", "sample"))
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0: got {eps}")
    r, inverse, groups = _by_group(rewards, group_ids)
    if kind == "none":
        return _like(rewards, r)
    size = np.bincount(inverse, minlength=groups)
    mean = np.bincount(inverse, r, groups) / size
    centred = np.where(_degenerate(r, inverse, groups)[inverse], 0.0, r - mean[inverse])
    others = np.maximum(size - 1, 1)
    if kind == "leave_one_out":
        centred = centred * (size / others)[inverse]
    elif kind == "group_std":
        square = np.bincount(inverse, centred * centred, groups)
        deviation = np.sqrt(square / (size if std == "population" else others)) + eps
        centred = centred / np.where(deviation > 0, deviation, 1.0)[inverse]
    return _like(rewards, centred)


def degenerate_group_share(rewards: Array, group_ids: Array) -> float:
    """Share of groups whose rewards are all equal (a group of one is): they teach nothing."""
    return float(_degenerate(*_by_group(rewards, group_ids)).mean())


def _by_group(rewards: Array, group_ids: Array) -> tuple[np.ndarray, np.ndarray, int]:
    r, ids = _numpy(rewards).astype(np.float64), _numpy(group_ids)
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
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, inverse, r)
    np.maximum.at(high, inverse, r)
    return low == high


def _numpy(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _like(rewards: Array, values: np.ndarray) -> Array:
    if not isinstance(rewards, torch.Tensor):
        return values
    dtype = rewards.dtype if rewards.dtype.is_floating_point else torch.float32
    return torch.as_tensor(values, dtype=dtype, device=rewards.device)
