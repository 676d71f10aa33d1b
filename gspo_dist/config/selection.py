"""Which rollouts of a batch train: groups that teach nothing, truncated completions, overlong ones."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import at_least, choose, true_or_false

DEGENERATE = ("keep", "drop", "refill")


@dataclass(frozen=True)
class SelectionConfig:
    """Which rollouts of a batch train. A degenerate group is one whose judged rewards are all equal."""

    degenerate: str = "keep"
    """keep | drop | refill. drop (ScaleRL's zero-variance filter) takes degenerate groups out of the batch
    and of its denominators. refill (DAPO's dynamic sampling) asks for more groups than a step trains, decided
    before anything is sampled, and trains the first that are not degenerate, in the order of their ids."""
    over_asked: int | None = None
    """Groups beyond rollout.prompts_per_step that each try of refill asks for. Null: as many again."""
    tries: int = 10
    """Times that refill asks within a step. A run stops when groups are still missing then."""
    mask_truncated: bool = False
    """Leave completions that were cut off at the token limit out of the loss (DAPO's overlong filtering).
    They still count in their group's baseline."""
    overlong_penalty: float = 0.0
    """Largest penalty on a long completion (DAPO's soft overlong punishment, 1 there). It enters the
    advantages only: logged rewards stay as they were judged. 0: none."""
    overlong_buffer: float = 0.2
    """Last share of rollout.max_completion_tokens, in which the penalty grows from 0 to its largest."""

    def __post_init__(self) -> None:
        choose("objective.selection.degenerate", self.degenerate, DEGENERATE)
        true_or_false("objective.selection.mask_truncated", self.mask_truncated)
        at_least("objective.selection.over_asked", self.over_asked, 0)
        at_least("objective.selection.tries", self.tries, 1)
        at_least("objective.selection.overlong_penalty", self.overlong_penalty, 0.0)
        if not 0 < self.overlong_buffer <= 1:
            raise ValueError(
                f"objective.selection.overlong_buffer must be a share in (0, 1]: got {self.overlong_buffer}"
            )

    @property
    def refills(self) -> bool:
        """Whether a step goes on asking until it has its groups."""
        return self.degenerate == "refill"

    def asked(self, prompts_per_step: int) -> int:
        """Groups that one try asks for. Example: 4 prompts a step and over_asked null make 8."""
        if not self.refills:
            return prompts_per_step
        return prompts_per_step + (prompts_per_step if self.over_asked is None else self.over_asked)

    def ids_per_step(self, prompts_per_step: int) -> int:
        """Group ids that a step keeps for itself, so that no try of it takes another step's."""
        return self.asked(prompts_per_step) * (self.tries if self.refills else 1)

    def words(self, prompts_per_step: int) -> list[str]:
        """What is switched on, for a run to say at its start."""
        said = []
        if self.refills:
            said.append(
                f"dynamic sampling: {self.asked(prompts_per_step)} groups are asked for, the first "
                f"{prompts_per_step} whose rewards differ train, {self.tries} tries at most"
            )
        if self.degenerate == "drop":
            said.append("zero-variance filter: groups of equal rewards leave the batch")
        if self.mask_truncated:
            said.append("completions cut off at the token limit are not trained on")
        if self.overlong_penalty:
            said.append(
                f"overlong penalty: up to {self.overlong_penalty:g} in the last "
                f"{self.overlong_buffer:.0%} of the token limit"
            )
        return said
