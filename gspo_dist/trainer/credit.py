"""An advantage for every turn of an episode, on the tokens of the turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gspo_dist.objectives.advantages import turn_advantages
from gspo_dist.types import Rollout


def advantages_by_turn(
    rollouts: Sequence[Rollout], penalties: Sequence[float], kind: str
) -> list[np.ndarray]:
    """Advantages [tokens of the completion] float64 of each rollout; 0 for what an environment said.

    penalties: what is taken from each reward. kind: the estimator.
    """
    rewards = [turn_rewards(r, penalty) for r, penalty in zip(rollouts, penalties, strict=True)]
    by_turn = turn_advantages(rewards, np.array([r.group_id for r in rollouts]), kind)
    found = []
    for rollout, own in zip(rollouts, by_turn, strict=True):
        tokens = np.zeros(len(rollout.completion), np.float64)
        for turn, advantage in zip(rollout.completion.turns[1:], own, strict=True):
            tokens[turn.start : turn.end] = advantage
        found.append(tokens)
    return found


def turn_rewards(rollout: Rollout, penalty: float = 0.0) -> np.ndarray:
    """What each turn of the policy was paid, [turns] float64: their sum is the rollout's reward.

    What the environment did not pay itself, as the reward function's verdict on the whole episode, is paid
    for the last turn. Example: turns paid 0.5 and 0 of an episode with a reward of 1.5 have 0.5 and 1.
    """
    paid = np.array([turn.reward for turn in rollout.completion.turns[1:]], np.float64)
    paid[-1] += rollout.reward - penalty - paid.sum()
    return paid
