"""Rewards computed in this process: the pool of runs without Ray (tests, debugging). It has no deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import Item, Judged, judge_rollout, resolve_reward


class RewardPool(Protocol):
    """Whatever judges the rollouts of a run."""

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """The verdict on every item, in order. May be called any number of times.

        Raises RewardError when a reward function fails; the message names the rollout.
        """
        ...

    def close(self) -> None:
        """Ends what the pool started. A second call does nothing."""
        ...


class LocalRewardPool:
    """Judges rollouts one after the other."""

    def __init__(self, config: RewardConfig) -> None:
        self.function = resolve_reward(config)

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        return [
            judge_rollout(self.function, prompt, completion, rollout_id)
            for rollout_id, prompt, completion in items
        ]

    def close(self) -> None:
        """Nothing to end."""
