"""Dynamic sampling: which of a step's groups train, when more are asked for than it needs.

A try asks for a number of groups that is known before anything is sampled, and is sampled to its end. The
groups that train are then the first in the order of their ids whose rewards differ. So nothing is chosen for
being quick: an engine that finishes short completions first gives the same batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from gspo_dist.config import SelectionConfig
from gspo_dist.objectives.advantages import degenerate_groups
from gspo_dist.types import Rollout


class NothingToLearn(RuntimeError):
    """A step has asked for groups as often as it may, and too few of them teach anything."""


class Refill:
    """The groups of one step after another: how many are asked for, which train, and what is said of it."""

    def __init__(self, config: SelectionConfig, prompts_per_step: int) -> None:
        self.config, self.wanted = config, prompts_per_step
        self.asked = config.asked(prompts_per_step)
        """Groups of one try."""
        self.ids_per_step = config.ids_per_step(prompts_per_step)
        """Group ids that a step keeps for itself."""
        self.told: dict[str, float] = {}
        """selection/* of the last step that was chosen from."""

    def choose(self, rollouts: Sequence[Rollout], tries: int, step: int) -> list[Rollout] | None:
        """The rollouts that train, of all that `step` has sampled, group after group. None: ask again.

        Without refill they are all. Raises NothingToLearn after the last try, with the solve rates.
        """
        if not self.config.refills:
            return list(rollouts)
        groups = np.array([r.group_id for r in rollouts])
        rewards = np.array([r.reward for r in rollouts])
        degenerate = degenerate_groups(rewards, groups)
        teaching = list(dict.fromkeys(groups[~degenerate].tolist()))
        if len(teaching) < self.wanted:
            if tries < self.config.tries:
                return None
            raise NothingToLearn(self._why(rollouts, len(teaching), tries, step))
        chosen = set(teaching[: self.wanted])
        self.told = {
            "selection/tries": float(tries),
            "selection/asked_groups": float(len(set(groups.tolist()))),
            "selection/asked_degenerate_fraction": float(degenerate.mean()),
            "selection/asked_reward_mean": float(rewards.mean()),
        }
        return [r for r in rollouts if r.group_id in chosen]

    def _why(self, rollouts: Sequence[Rollout], teaching: int, tries: int, step: int) -> str:
        means: dict[int, list[float]] = {}
        for rollout in rollouts:
            means.setdefault(rollout.group_id, []).append(rollout.reward)
        rates = Counter(f"{np.mean(of_group):.2f}" for of_group in means.values())
        told = ", ".join(f"{rate}: {count}" for rate, count in sorted(rates.items()))
        return (
            f"objective.selection.degenerate=refill needs {self.wanted} groups whose rewards differ: step "
            f"{step} got {teaching} of {len(means)} in {tries} tries (mean reward of a group: groups with "
            f"it: {told}); give prompts that are neither always nor never solved, raise rollout.group_size "
            "or objective.selection.tries, or set degenerate=drop"
        )
