"""Running an evaluation with engines and reward workers that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gspo_dist.evaluation.suite import evaluate
from gspo_dist.rewards.pool import RewardPool
from gspo_dist.types import Completion, Prompt, SamplingSpec

Generate = Callable[[Sequence[Prompt], SamplingSpec], list[list[Completion]]]
"""(prompts, how to sample) -> the completions of every prompt, in order."""


def evaluate_heldout(
    generate: Generate, rewards: RewardPool, prompts: Sequence[Prompt], spec: SamplingSpec
) -> dict[str, float]:
    """Held-out metrics (eval/heldout/*) from a run's engines and reward workers.

    A reward that fails is raised with a note that it was judging an evaluation, where ids
    count its completions.
    """
    judged: dict[int, float] = {}

    def sample(chosen: Sequence[Prompt], asked: SamplingSpec) -> list[list[Completion]]:
        groups = generate(chosen, asked)
        flat = [(prompt, c) for prompt, group in zip(chosen, groups, strict=True) for c in group]
        try:
            verdicts = rewards.judge([(i, prompt, c) for i, (prompt, c) in enumerate(flat)])
        except Exception as error:
            error.add_note(
                "while judging held-out prompts: here `rollout` counts the evaluation's completions"
            )
            raise
        judged.update({id(c): verdict.reward for (_, c), verdict in zip(flat, verdicts, strict=True)})
        return groups

    result = evaluate(sample, prompts, lambda _, completion: judged[id(completion)], spec)
    return result.metrics() | {"eval/heldout/accuracy": result.accuracy}
