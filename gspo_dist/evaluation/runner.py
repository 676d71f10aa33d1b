"""Running an evaluation with engines and reward workers that are already there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gspo_dist.evaluation.suite import Generate, evaluate
from gspo_dist.rewards.reward import Item, Judged
from gspo_dist.types import Prompt, SamplingSpec


class Judges(Protocol):
    """A reward pool, or what asks one."""

    def judge(self, items: Sequence[Item]) -> list[Judged]: ...


def evaluate_heldout(
    generate: Generate, rewards: Judges, prompts: Sequence[Prompt], spec: SamplingSpec
) -> dict[str, float]:
    """Held-out metrics (eval/heldout/*) from a run's engines and reward workers.

    Raises what they raise; the message of a failing reward names its prompt.
    """
    result = evaluate(generate, rewards.judge, prompts, spec)
    return result.metrics() | {"eval/heldout/accuracy": result.accuracy}
