"""Evaluates one set of prompts: accuracy with its standard error, pass@k, lengths, and a row for every prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gspo_dist.evaluation.pass_at_k import pass_at_k
from gspo_dist.rewards.reward import Reward, checked
from gspo_dist.types import Completion, Prompt, SamplingSpec

Generate = Callable[[list[Prompt], SamplingSpec], list[list[Completion]]]


@dataclass(frozen=True)
class EvalRow:
    """One prompt and its k completions."""

    prompt_id: str
    prompt: str
    answer: str
    rewards: tuple[float, ...]
    correct: int
    lengths: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    completions: tuple[str, ...]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. k = completions a prompt.

    accuracy: avg@k, the share of right completions, between 0 and 1. standard_error: of it, with the prompts as
    clusters (nan for one prompt: there is nothing to estimate it from). pass_at: k' -> pass@k'.
    mean_length: tokens a completion. truncated: share of completions cut off at max_tokens.
    """

    suite: str
    k: int
    accuracy: float
    standard_error: float
    pass_at: dict[int, float]
    reward_mean: float
    mean_length: float
    truncated: float
    rows: tuple[EvalRow, ...]

    def metrics(self) -> dict[str, float]:
        """The numbers under their public names, e.g. eval/heldout/avg@4; those that are not defined are left out."""
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
    prompts: Sequence[Prompt],
    reward_fn: Reward,
    spec: SamplingSpec,
    *,
    suite: str = "heldout",
    correct_at: float = 1.0,
) -> EvalResult:
    """Samples `spec.n` completions for every prompt and judges them; right means a reward of `correct_at` or more.

    pass@k' is given for the powers of two below spec.n and for spec.n itself.
    Raises ValueError without prompts or when `generate` gives another number of completions than asked for, and
    RewardError when the reward function fails.
    """
    if not prompts:
        raise ValueError(f"evaluation {suite!r} must have at least one prompt: got none; set data.heldout")
    completions = generate(list(prompts), spec)
    if len(completions) != len(prompts) or any(len(group) != spec.n for group in completions):
        raise ValueError(
            f"evaluation {suite!r}: generate must give {spec.n} completions for each of {len(prompts)} prompts: got "
            f"{len(completions)} groups of {sorted({len(group) for group in completions})}"
        )
    rows = tuple(
        _row(prompt, group, reward_fn, correct_at) for prompt, group in zip(prompts, completions, strict=True)
    )
    return summarise(suite, spec.n, rows)


def summarise(suite: str, k: int, rows: tuple[EvalRow, ...]) -> EvalResult:
    """The numbers over rows of `k` completions each."""
    count = len(rows)
    means = [row.correct / k for row in rows]
    accuracy = math.fsum(means) / count
    ks = sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
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
    """sqrt(sum (m_i - mean)^2 / (N (N - 1))) over N clusters of equal size: completions of one prompt rise and fall
    together, so the prompts are the independent draws, not the completions. nan for one cluster.
    """
    n = len(cluster_means)
    if n < 2:
        return math.nan
    mean = math.fsum(cluster_means) / n
    return math.sqrt(math.fsum((m - mean) ** 2 for m in cluster_means) / (n * (n - 1)))


def _row(prompt: Prompt, group: Sequence[Completion], reward_fn: Reward, correct_at: float) -> EvalRow:
    rewards = []
    for i, completion in enumerate(group):
        rewards.append(_judge(reward_fn, prompt, completion, i))
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


def _judge(reward_fn: Reward, prompt: Prompt, completion: Completion, index: int) -> float:
    return checked(
        reward_fn(prompt, completion), f"reward of completion {index} of prompt {prompt.prompt_id}"
    ).reward
