"""Evaluates one set of prompts: accuracy with its standard error, pass@k, lengths, and a row per prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gspo_dist.evaluation.pass_at_k import pass_at_k
from gspo_dist.rewards.reward import Item, Judged
from gspo_dist.types import Completion, Prompt, SamplingSpec

Generate = Callable[[Sequence[Prompt], SamplingSpec], list[list[Completion]]]
"""(prompts, how to sample) -> the completions of every prompt, in order."""
Judge = Callable[[Sequence[Item]], Sequence[Judged]]
"""What a reward pool's `judge` does."""


@dataclass(frozen=True)
class EvalRow:
    """One prompt and its k completions."""

    prompt_id: str
    prompt: str
    """Its text."""
    answer: str
    """What the reward compared with, as text."""
    rewards: tuple[float, ...]
    """One per completion, as all that follows."""
    correct: int
    """How many completions are right."""
    lengths: tuple[int, ...]
    """Tokens."""
    finish_reasons: tuple[str, ...]
    """stop, or length where the completion was cut off."""
    completions: tuple[str, ...]
    """Texts."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    suite: str
    """Its name in metrics."""
    k: int
    """Completions per prompt."""
    accuracy: float
    """avg@k, the share of right completions, between 0 and 1."""
    standard_error: float
    """Of the accuracy, with the prompts as clusters; nan for one prompt."""
    pass_at: dict[int, float]
    """k' -> pass@k', the chance that one of k' completions is right."""
    reward_mean: float
    """Over all completions."""
    mean_length: float
    """Tokens per completion."""
    truncated: float
    """Share of completions that were cut off at max_tokens."""
    rows: tuple[EvalRow, ...]
    """One per prompt, in order."""

    def metrics(self) -> dict[str, float]:
        """The numbers under their public names, such as eval/heldout/avg@4; undefined ones are left out."""
        at = f"eval/{self.suite}/"
        named = {
            f"{at}avg@{self.k}": self.accuracy,
            f"{at}avg@{self.k}_standard_error": self.standard_error,
            f"{at}reward_mean": self.reward_mean,
            f"{at}completion_length_mean_tokens": self.mean_length,
            f"{at}truncated_fraction": self.truncated,
            **{f"{at}pass@{k}": value for k, value in self.pass_at.items()},
        }
        return {name: value for name, value in named.items() if math.isfinite(value)}


def evaluate(
    generate: Generate,
    judge: Judge,
    prompts: Sequence[Prompt],
    spec: SamplingSpec,
    *,
    suite: str = "heldout",
    correct_at: float = 1.0,
) -> EvalResult:
    """Samples `spec.n` completions per prompt and judges them. A reward of `correct_at` or more is right.

    pass@k' is given for the powers of two below spec.n and for spec.n itself.

    Raises ValueError without prompts, and when `generate` gives another number of completions than asked for.
    Raises what `judge` raises.
    """
    if not prompts:
        raise ValueError(f"evaluation {suite!r} must have at least one prompt: got none; set data.heldout")
    groups = generate(prompts, spec)
    if len(groups) != len(prompts) or any(len(group) != spec.n for group in groups):
        raise ValueError(
            f"evaluation {suite!r}: generate must give {spec.n} completions for each of {len(prompts)} "
            f"prompts: got {len(groups)} groups of {sorted({len(group) for group in groups})}"
        )
    pairs = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    # In one call, so that a pool spreads them over its workers. -1: they are no rollouts of the run.
    rewards = [verdict.reward for verdict in judge([(-1, prompt, c) for prompt, c in pairs])]
    rows = tuple(
        _row(prompt, group, rewards[i * spec.n : (i + 1) * spec.n], correct_at)
        for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
    )
    return summarise(suite, spec.n, rows)


def summarise(suite: str, k: int, rows: tuple[EvalRow, ...]) -> EvalResult:
    """The numbers over rows of `k` completions each. Example: k 6 gives pass@1, @2, @4 and @6."""
    count = len(rows)
    means = [row.correct / k for row in rows]
    accuracy = math.fsum(means) / count
    ks = sorted({2**i for i in range(k.bit_length())} | {k})
    completions = count * k
    return EvalResult(
        suite=suite,
        k=k,
        accuracy=accuracy,
        standard_error=clustered_standard_error(means),
        pass_at={at: math.fsum(pass_at_k(k, row.correct, at) for row in rows) / count for at in ks},
        reward_mean=math.fsum(r for row in rows for r in row.rewards) / completions,
        mean_length=sum(n for row in rows for n in row.lengths) / completions,
        truncated=sum(reason == "length" for row in rows for reason in row.finish_reasons) / completions,
        rows=rows,
    )


def clustered_standard_error(cluster_means: Sequence[float]) -> float:
    """sqrt(sum (m_i - mean)^2 / (N (N - 1))) over N clusters of equal size; nan for one cluster.

    Completions of one prompt rise and fall together, so the independent draws are the prompts.
    """
    n = len(cluster_means)
    if n < 2:
        return math.nan
    mean = math.fsum(cluster_means) / n
    return math.sqrt(math.fsum((m - mean) ** 2 for m in cluster_means) / (n * (n - 1)))


def _row(prompt: Prompt, group: Sequence[Completion], rewards: Sequence[float], correct_at: float) -> EvalRow:
    return EvalRow(
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        answer=str(prompt.answer),
        rewards=tuple(rewards),
        correct=sum(reward >= correct_at for reward in rewards),
        lengths=tuple(len(completion) for completion in group),
        finish_reasons=tuple(completion.finish_reason for completion in group),
        completions=tuple(completion.text for completion in group),
    )
