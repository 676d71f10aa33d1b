"""Collecting a rollout batch: sample groups, judge them, and describe them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gspo_dist.evaluation.suite import evaluate
from gspo_dist.objectives.diagnostics import advantage_statistics, degenerate_group_share, length_by_outcome
from gspo_dist.rewards.pool import RewardPool
from gspo_dist.types import Completion, Prompt, Rollout, SamplingSpec


def judge(
    rewards: RewardPool,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    first_group_id: int,
) -> list[Rollout]:
    """Sampled groups as scored rollouts, group after group. Ids count on from `first_group_id`."""
    size = len(groups[0])
    items = [
        ((first_group_id + g) * size + i, prompt, completion)
        for g, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for i, completion in enumerate(group)
    ]
    verdicts = rewards.judge(items)
    return [
        Rollout(rollout_id, first_group_id + n // size, prompt, completion, reward, parts)
        for n, ((rollout_id, prompt, completion), (reward, parts)) in enumerate(
            zip(items, verdicts, strict=True)
        )
    ]


def describe(rollouts: Sequence[Rollout], advantages: np.ndarray, policy_version: int) -> dict[str, float]:
    """rollout/*, reward/* and advantage/* metrics of a batch."""
    rewards = np.array([r.reward for r in rollouts])
    lengths = np.array([len(r.completion) for r in rollouts])
    truncated = np.array([r.completion.finish_reason == "length" for r in rollouts])
    oldest = min(int(r.completion.policy_versions.min()) for r in rollouts)
    out = {
        "rollout/reward_mean": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std()),
        "rollout/completion_tokens_mean": float(lengths.mean()),
        "rollout/completion_tokens_max": float(lengths.max()),
        "rollout/truncated_fraction": float(truncated.mean()),
        "rollout/degenerate_group_fraction": degenerate_group_share(
            rewards, np.array([r.group_id for r in rollouts])
        ),
        "rollout/staleness": float(policy_version - oldest),
    }
    out |= advantage_statistics(advantages)
    out |= length_by_outcome(lengths, rewards >= 1.0)
    parts = {key for r in rollouts for key in r.reward_parts}
    for key in sorted(parts):
        name = "reward/timeout_fraction" if key == "timeout" else f"reward/{key}"
        out[name] = float(np.mean([r.reward_parts.get(key, 0.0) for r in rollouts]))
    return out


def probe_sequences(sampled: Sequence[tuple[Prompt, Completion]]) -> list[tuple[np.ndarray, int]]:
    """(tokens, start of the completion) for the log-prob probe of a weight sync."""
    return [(np.concatenate([p.token_ids, c.token_ids]), len(p.token_ids)) for p, c in sampled]


def sample_rows(rollouts: Sequence[Rollout], advantages: np.ndarray, count: int) -> list[dict[str, Any]]:
    """A few rollouts as rows for samples.jsonl: evenly spaced over the batch."""
    places = (
        np.unique(np.linspace(0, len(rollouts) - 1, num=min(count, len(rollouts)), dtype=int))
        if count
        else []
    )
    return [
        {
            "rollout_id": rollouts[i].rollout_id,
            "prompt": rollouts[i].prompt.text,
            "completion": rollouts[i].completion.text,
            "answer": rollouts[i].prompt.answer,
            "reward": rollouts[i].reward,
            "advantage": float(advantages[i]),
            "tokens": len(rollouts[i].completion),
            "finish_reason": rollouts[i].completion.finish_reason,
        }
        for i in places
    ]


def evaluate_with(
    generate: Callable[[Sequence[Prompt], SamplingSpec], list[list[Completion]]],
    rewards: RewardPool,
    prompts: Sequence[Prompt],
    spec: SamplingSpec,
) -> dict[str, float]:
    """Held-out metrics (eval/heldout/*) with the run's engines and reward processes."""
    judged: dict[int, float] = {}

    def sample(chosen: list[Prompt], asked: SamplingSpec) -> list[list[Completion]]:
        groups = generate(chosen, asked)
        items = [(-1, p, c) for p, group in zip(chosen, groups, strict=True) for c in group]
        judged.update({id(c): v.reward for (_, _, c), v in zip(items, rewards.judge(items), strict=True)})
        return groups

    result = evaluate(sample, prompts, lambda _, completion: judged[id(completion)], spec)
    return result.metrics() | {"eval/heldout/accuracy": result.accuracy}
