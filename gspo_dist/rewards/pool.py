"""Rewards computed in this process: the pool of runs without Ray (tests, debugging). It has no deadline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import resolve_reward, score_rollout
from gspo_dist.types import Completion, Prompt


class LocalRewardPool:
    """Judges rollouts one after the other."""

    def __init__(self, config: RewardConfig) -> None:
        self.function = resolve_reward(config)

    def score(
        self, items: Sequence[tuple[int, Prompt, Completion]]
    ) -> list[tuple[float, Mapping[str, float]]]:
        return [
            score_rollout(self.function, prompt, completion, rollout_id)
            for rollout_id, prompt, completion in items
        ]

    def close(self) -> None:
        """Nothing to end."""
