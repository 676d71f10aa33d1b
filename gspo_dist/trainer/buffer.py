"""The rollouts of steps that are begun and not yet trained, as plain data: what a checkpoint must not lose.

A step's groups are those that the cursor handed out for it. A completion is unfinished (in an engine, or
waiting for one), finished, or judged. Nothing leaves but with its whole step, in the cursor's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gspo_dist.rewards.reward import Item, Judged
from gspo_dist.types import Completion, Prompt, Rollout, SamplingSpec, Work, WorkKey


@dataclass
class BegunStep:
    """One step that is begun."""

    prompts: Sequence[Prompt]
    first_group: int
    spec: SamplingSpec
    cursor: Mapping[str, Any]
    """The cursor's place after the step's prompts."""
    drawn: list[int] = field(default_factory=list)
    """Places of the prompts in their source, where the cursor could not hand them out again."""
    tries: int = 1
    """Times that the step asked for groups."""
    finished: dict[WorkKey, Completion] = field(default_factory=dict)
    verdicts: dict[WorkKey, Judged] = field(default_factory=dict)

    def all_keys(self) -> list[WorkKey]:
        """Its completions, group after group."""
        groups = range(self.first_group, self.first_group + len(self.prompts))
        return [(group, sample) for group in groups for sample in range(self.spec.n)]

    def prompt(self, key: WorkKey) -> Prompt:
        return self.prompts[key[0] - self.first_group]

    def is_sampled(self) -> bool:
        return len(self.finished) == len(self.prompts) * self.spec.n

    def unjudged(self) -> list[Item]:
        """Finished completions without a verdict, as a reward pool takes them, group after group."""
        # It is asked after every slice while engines wait, so it looks at the new ones alone.
        return [
            (key[0] * self.spec.n + key[1], self.prompt(key), self.finished[key])
            for key in sorted(self.finished.keys() - self.verdicts.keys())
        ]

    def take(self, items: Iterable[Item], verdicts: Iterable[Judged]) -> None:
        """Notes the verdicts of items that `unjudged` gave."""
        for (rollout_id, _, _), verdict in zip(items, verdicts, strict=True):
            self.verdicts[divmod(rollout_id, self.spec.n)] = verdict

    def add(self, prompts: Sequence[Prompt], drawn: Sequence[int]) -> list[Work]:
        """Another try: more groups, with the ids after the step's own. Returns what is to be sampled."""
        begin = self.first_group + len(self.prompts)
        self.prompts, self.drawn = [*self.prompts, *prompts], [*self.drawn, *drawn]
        self.tries += 1
        return [
            Work(begin + i, sample, prompt, self.spec)
            for i, prompt in enumerate(prompts)
            for sample in range(self.spec.n)
        ]

    def rollouts(self) -> list[Rollout]:
        """The whole step, once it is sampled and judged.

        Example: first_group 3 and two groups of 2 give group ids [3, 3, 4, 4] and rollout ids [6, 7, 8, 9].
        """
        return [
            Rollout(
                group * self.spec.n + sample,
                group,
                self.prompt((group, sample)),
                self.finished[group, sample],
                self.verdicts[group, sample].reward,
                self.verdicts[group, sample].parts,
            )
            for group, sample in self.all_keys()
        ]


@dataclass
class Buffer:
    """All steps that are begun and not trained, and the work of theirs that no engine has."""

    begun: int = 0
    """The last step that is begun; steps count from 1."""
    steps: dict[int, BegunStep] = field(default_factory=dict)
    waiting: list[Work] = field(default_factory=list)
    """Unfinished completions that are in no engine, in the order of their keys."""

    def begin(self, step: BegunStep) -> None:
        """Takes the next step; its completions wait for engines."""
        self.begun += 1
        self.steps[self.begun] = step
        self.waiting += [Work(*key, step.prompt(key), step.spec) for key in step.all_keys()]

    def finish(self, finished: Mapping[WorkKey, Completion]) -> None:
        """Takes completions that became whole."""
        for key, completion in finished.items():
            step = self.step_of(key)
            if step is None:
                raise KeyError(f"completion {key[1]} of group {key[0]} belongs to no step that is begun")
            step.finished[key] = completion

    def step_of(self, key: WorkKey) -> BegunStep | None:
        """The step that a completion belongs to, where it is begun and not trained."""
        for step in self.steps.values():
            if step.first_group <= key[0] < step.first_group + len(step.prompts):
                return step
        return None

    def go_on(self, so_far: Mapping[WorkKey, Completion]) -> None:
        """Takes up what waiting completions had; those that are finished by now wait no more."""
        finished = {key for step in self.steps.values() for key in step.finished}
        self.waiting = [
            replace(item, so_far=so_far[item.key]) if item.key in so_far else item
            for item in self.waiting
            if item.key not in finished
        ]

    def tokens(self) -> int:
        """Tokens sampled for steps that are not trained, without what engines hold."""
        finished = sum(len(c) for step in self.steps.values() for c in step.finished.values())
        return finished + sum(len(item.so_far) for item in self.waiting)
