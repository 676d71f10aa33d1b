"""From a batch of judged rollouts to those that train, and to their advantages.

Left out are groups of equal rewards (`objective.selection.degenerate=drop`) and completions that were cut off
(`mask_truncated`). They leave the denominators too. A batch must not run dry for that: where too few are left
for the mini-batches and replicas, the first groups come back with an advantage of 0, which trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gspo_dist.config import ObjectiveConfig
from gspo_dist.objectives.advantages import degenerate_groups, group_advantages, position_advantages
from gspo_dist.packing import Advantage
from gspo_dist.trainer.credit import advantages_by_turn
from gspo_dist.types import Rollout


@dataclass(frozen=True)
class Selected:
    """What of a batch trains."""

    advantages: np.ndarray
    """float64, one for every rollout of the batch; 0 for those that are left out. With advantages by token,
    the mean over its trained tokens."""
    places: np.ndarray
    """Places in the batch of the rollouts that are packed, going up."""
    trained: Sequence[Rollout]
    """Those rollouts."""
    given: list[Advantage]
    """What is packed with each of them: its advantage, or one for every token of its completion."""
    metrics: dict[str, float]
    """selection/* where something is selected."""


def overlong_penalty(lengths: np.ndarray, max_tokens: int, buffer: float) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq 13) with a largest value of 1, float64 [R].

    0 up to (1 - buffer) max_tokens, then growing linearly to 1 at max_tokens.
    Example: max_tokens 20 and buffer 0.2 give 0 for 16 tokens, 0.5 for 18 and 1 for 20.
    """
    width = buffer * max_tokens
    return np.clip((np.asarray(lengths, np.float64) - (max_tokens - width)) / width, 0.0, 1.0)


def select(
    rollouts: Sequence[Rollout],
    config: ObjectiveConfig,
    advantage: str,
    *,
    max_tokens: int,
    mini_batches: int,
    replicas: int,
) -> Selected:
    """advantage: the estimator in force. max_tokens: at which this step's completions were cut off.

    Raises ValueError where the reward does not have a part that gdpo is to read.
    """
    chosen = config.selection
    groups = np.array([r.group_id for r in rollouts])
    lengths = np.array([len(r.completion) for r in rollouts])
    penalty = chosen.overlong_penalty * overlong_penalty(lengths, max_tokens, chosen.overlong_buffer)
    dropped = np.zeros(len(rollouts), np.bool_)
    if chosen.degenerate == "drop":
        dropped = degenerate_groups(np.array([r.reward for r in rollouts]), groups)
    out = dropped
    if chosen.mask_truncated:
        out = dropped | np.array([r.completion.finish_reason == "length" for r in rollouts])
    given: list[Advantage] = [0.0] * len(rollouts)
    # Truncated ones take part here: they are left out of the loss, and not of their group's baseline.
    rest = np.flatnonzero(~dropped)
    if len(rest):
        own = _advantages([rollouts[i] for i in rest], penalty[rest], config, advantage)
        for i, value in zip(rest.tolist(), own, strict=True):
            given[i] = 0.0 if out[i] else value
    packed = _filled(~out, groups, mini_batches, replicas)
    places = np.flatnonzero(packed)
    metrics: dict[str, float] = {}
    if chosen.degenerate == "drop" or chosen.mask_truncated:
        metrics["selection/left_out_fraction"] = float(out.mean())
        metrics["selection/filled_fraction"] = float((packed & out).mean())
    if chosen.overlong_penalty:
        metrics["selection/overlong_penalty_mean"] = float(penalty.mean())
    return Selected(
        np.array([_mean(value, r) for value, r in zip(given, rollouts, strict=True)]),
        places,
        [rollouts[i] for i in places],
        [given[i] for i in places],
        metrics,
    )


def _advantages(
    rollouts: Sequence[Rollout], penalties: np.ndarray, config: ObjectiveConfig, kind: str
) -> Sequence[Advantage]:
    """What `objective.credit` gives each of these rollouts. penalties: taken from their rewards, [R]."""
    if config.credit == "turn":
        return advantages_by_turn(rollouts, penalties.tolist(), kind)
    groups = np.array([r.group_id for r in rollouts])
    if config.credit == "position":
        paid = [payments(r, -penalty) for r, penalty in zip(rollouts, penalties.tolist(), strict=True)]
        return position_advantages(paid, [len(r.completion) for r in rollouts], groups, kind)
    rewards = np.array([r.reward for r in rollouts]) - penalties
    parts = _parts(rollouts, config) if kind == "gdpo" else {}
    found: list[float] = group_advantages(rewards, groups, kind, **parts).tolist()
    return found


def _mean(given: Advantage, rollout: Rollout) -> float:
    """The advantage of a rollout as one number: the mean over its trained tokens."""
    return float(given[rollout.completion.loss_mask].mean()) if isinstance(given, np.ndarray) else given


def payments(rollout: Rollout, penalty: float = 0.0) -> list[tuple[int, float]]:
    """What a reward pays at which tokens: its parts named NAME@TOKEN, and the penalty at the last token.

    A rollout without such parts is paid its whole reward at its last token.
    Example: parts {"step@3": 1.0, "right": 0.5} pay 1 at token 3.
    """
    paid = []
    for name, reward in rollout.reward_parts.items():
        _, found, at = name.rpartition("@")
        if found and at.isdigit():
            paid.append((int(at), reward))
    last = len(rollout.completion) - 1
    if not paid:
        paid.append((last, rollout.reward))
    return [*paid, (last, penalty)] if penalty else paid


def _parts(rollouts: Sequence[Rollout], config: ObjectiveConfig) -> dict[str, Any]:
    """The parts of the reward that gdpo reads, [R, n], and their weights.

    A rollout without a part counts as 0: one whose reward ran past its deadline has none.
    """
    names = list(config.reward_parts)
    known = sorted({name for r in rollouts for name in r.reward_parts})
    for name in names:
        if name not in known:
            raise ValueError(
                f"objective.reward_parts must name parts that the reward gives: got {name!r}, and this batch "
                f"has {known or 'no parts'}; a reward gives parts as (number, {{name: number}}), as "
                "weighted_sum does"
            )
    columns = [[r.reward_parts.get(name, 0.0) for name in names] for r in rollouts]
    return {"parts": np.array(columns), "weights": [float(config.reward_parts[name]) for name in names]}


def _filled(kept: np.ndarray, groups: np.ndarray, mini_batches: int, replicas: int) -> np.ndarray:
    """`kept`, with whole groups put back until every mini-batch has a group and a rollout for every replica.

    The split into mini-batches is random, so the smallest groups must be enough for any of them.
    """
    kept = kept.copy()
    for group in np.unique(groups):
        sizes = np.sort(np.unique(groups[kept], return_counts=True)[1])
        # With fewer groups than mini-batches this is the sum of none.
        if sizes[: len(sizes) // mini_batches].sum() >= replicas:
            break
        kept |= groups == group
    return kept
