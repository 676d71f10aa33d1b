"""From the rewards of a batch of groups to one advantage for each of its R rollouts, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gspo_dist.checks import choose
from gspo_dist.objectives.specs import ADVANTAGES


def group_advantages(
    rewards: np.ndarray,
    group_ids: np.ndarray,
    kind: str,
    *,
    eps: float = 1e-6,
    parts: np.ndarray | None = None,
    weights: Sequence[float] = (),
) -> np.ndarray:
    """One advantage per rollout, float64 [R].

    group_std      (r - mean) / (std + eps)         GRPO, GSPO: arXiv 2402.03300, 2507.18071 eq 3
    group_mean     r - mean                         Dr. GRPO, MiniRL: arXiv 2503.20783, 2512.01374
    leave_one_out  r - mean of the others,          RLOO: arXiv 2402.14740
                   which is G/(G-1) (r - mean)
    batch_std      (r - mean) / (S + eps), where    ScaleRL: arXiv 2510.13786
                   S is the root mean square of
                   r - mean over the whole batch
    maxrl          (r - mean) / (mean + eps)        MaxRL: arXiv 2602.02710
    gdpo           group_std of every part of the   GDPO: arXiv 2601.05242
                   reward, their weighted sum, and
                   that over its deviation in the
                   whole batch
    none           r

    rewards: finite numbers [R]. group_ids: [R], in any order. Rollouts with the same id are siblings.
    parts: finite numbers [R, n], and weights [n]: what gdpo normalises apart. The others take none.

    std divides by G, because the papers write std({r_1..r_G}), the deviation of the group itself. The
    advantages of a group then have mean square 1, whatever G is. An implementation that divides by G - 1, as
    torch.std does, gets advantages smaller by sqrt((G-1)/G), which is 3% at G = 16.

    A group of one, or of equal rewards, gets exactly 0 from all kinds but none and gdpo. gdpo gives it 0 from
    every part that is equal in the group.

    Example: one group has the rewards 1, 0, 0, 0. group_mean gives 0.75, -0.25, -0.25, -0.25, and
    leave_one_out gives 1, -1/3, -1/3, -1/3. maxrl gives 3, -1, -1, -1.

    Raises ValueError for an unknown kind, a negative eps, another shape, a reward that is not finite, or one
    below 0 for maxrl.
    """
    choose("advantage", kind, ADVANTAGES)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0: got {eps}")
    if kind == "gdpo":
        return _gdpo(rewards, group_ids, parts, weights, eps)
    if parts is not None or len(weights):
        raise ValueError(f"parts and weights are for gdpo alone: got them for {kind}")
    r, inverse, groups = _by_group(rewards, group_ids)
    if kind == "none":
        return r
    size = np.bincount(inverse, minlength=groups)
    mean = np.bincount(inverse, r, groups) / size
    # Equality is tested on the rewards: a deviation that is only rounding would be blown up to 1 below.
    centred = np.where(_degenerate(r, inverse, groups)[inverse], 0.0, r - mean[inverse])
    if kind == "maxrl":
        _refuse_negative(r, group_ids)
        return _over(centred, (mean + eps)[inverse])
    if kind == "batch_std":
        return _over(centred, np.sqrt(np.mean(centred * centred)) + eps)
    if kind == "leave_one_out":
        return centred * (size / np.maximum(size - 1, 1))[inverse]
    if kind == "group_std":
        square = np.bincount(inverse, centred * centred, groups)
        return _over(centred, (np.sqrt(square / size) + eps)[inverse])
    return centred


def _refuse_negative(rewards: np.ndarray, group_ids: np.ndarray) -> None:
    """ValueError that names the lowest reward, where that is below 0."""
    at = int(np.argmin(rewards))
    if rewards[at] < 0:
        raise ValueError(
            f"maxrl divides by the mean reward, so no reward may be below 0: got {rewards[at]} for rollout "
            f"{at} of group {np.asarray(group_ids)[at]}; shift the reward, or use another advantage"
        )


def _gdpo(
    rewards: np.ndarray,
    group_ids: np.ndarray,
    parts: np.ndarray | None,
    weights: Sequence[float],
    eps: float,
) -> np.ndarray:
    """The weighted sum of the parts, each normalised in its group, over its deviation in the batch."""
    columns = np.asarray(np.zeros((0, 0)) if parts is None else parts, np.float64)
    if columns.ndim != 2 or len(columns) != len(np.asarray(rewards)) or columns.shape[1] != len(weights):
        raise ValueError(
            f"gdpo needs parts [R={len(np.asarray(rewards))}, n] and n weights, n >= 1: got "
            f"{list(columns.shape)} and {len(weights)}"
        )
    if not len(weights):
        raise ValueError("gdpo needs at least one part of the reward: got none")
    total = np.zeros(len(columns))
    for column, weight in zip(columns.T, weights, strict=True):
        total += weight * group_advantages(column, group_ids, "group_std", eps=eps)
    centred = total - total.mean()
    return _over(centred, centred.std() + eps) if np.any(total) else total


def _over(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """values / scale, and the values where the scale is 0: they are 0 there."""
    return values / np.where(scale > 0, scale, 1.0)


Payments = Sequence[tuple[int, float]]
"""What one completion is paid, as (token, reward); the token counts from the completion's first."""


def position_advantages(
    paid: Sequence[Payments], lengths: Sequence[int], group_ids: np.ndarray, kind: str, *, eps: float = 1e-6
) -> list[np.ndarray]:
    """Process supervision (arXiv 2402.03300, section 4.1.3): an advantage for every token, float64 [N] each.

    Every payment is normalised with the mean and, for group_std, the deviation of all payments in its group.
    A token's advantage is the sum of the payments at it and after it. A group without a payment, or whose
    payments are all equal, gets 0.

    Example: one completion of 4 tokens is paid 1 at token 1 and 0 at token 3, its sibling of 2 tokens 0.5 at
    token 1. The mean is 0.5. group_mean gives [0, 0, -0.5, -0.5] and [0, 0].
    Raises ValueError for a payment beyond the completion, and for kinds without such a rule.
    """
    choose("advantage of positions", kind, ("group_std", "group_mean"))
    ids = np.asarray(group_ids)
    flat = [(i, at, float(reward)) for i, own in enumerate(paid) for at, reward in own]
    out = [np.zeros(n) for n in lengths]
    for i, at, reward in flat:
        if not 0 <= at < lengths[i] or not np.isfinite(reward):
            raise ValueError(
                f"a payment must be a finite number at a token of its completion: got {reward} at token {at} "
                f"of {lengths[i]} in rollout {i} of group {ids[i]}"
            )
    if flat:
        owners = np.array([i for i, _, _ in flat])
        worth = group_advantages(np.array([reward for *_, reward in flat]), ids[owners], kind, eps=eps)
        for (i, at, _), value in zip(flat, worth, strict=True):
            out[i][: at + 1] += value
    return out


def degenerate_groups(rewards: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """bool [R]: whether all rewards of the rollout's group are equal."""
    r, inverse, groups = _by_group(rewards, group_ids)
    return _degenerate(r, inverse, groups)[inverse]


def turn_advantages(
    rewards: Sequence[np.ndarray], group_ids: np.ndarray, kind: str, *, eps: float = 1e-6
) -> list[np.ndarray]:
    """One advantage per turn of each of R episodes: R arrays [turns of the episode] float64.

    What a turn is worth is what is paid from it on. Its baseline is that of the siblings which have a turn of
    the same number: `group_advantages` of theirs. So where all is paid at the end, and siblings have as many
    turns, every turn gets the episode's advantage. A turn that no sibling has gets 0 from the kinds that
    compare.

    rewards: what each turn was paid, [turns] finite numbers, at least one.

    Example: siblings paid (1, 0) and (0, 0) are worth (1, 0) and (0, 0) from each turn on. group_mean gives
    (0.5, 0) and (-0.5, 0): the second turns made no difference.

    Raises ValueError as `group_advantages`, and for an episode without a turn.
    """
    if any(len(own) == 0 for own in rewards):
        raise ValueError("every episode must have a turn: got one without any")
    ids = np.asarray(group_ids)
    worth = [np.cumsum(np.asarray(own, np.float64)[::-1])[::-1] for own in rewards]
    out = [np.zeros(len(own)) for own in worth]
    for turn in range(max(len(own) for own in worth)):
        having = [i for i, own in enumerate(worth) if len(own) > turn]
        found = group_advantages(np.array([worth[i][turn] for i in having]), ids[having], kind, eps=eps)
        for i, value in zip(having, found, strict=True):
            out[i][turn] = value
    return out


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
