"""What one step reports: a record with one part per source, and the functions that make the parts.

Names, units and meanings of all keys are in metrics/names.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from gspo_dist.config import RolloutConfig
from gspo_dist.learners.learner import OptimStep
from gspo_dist.metrics.stat import Stat, merge_stats, results
from gspo_dist.objectives.advantages import degenerate_group_share
from gspo_dist.objectives.diagnostics import advantage_statistics, length_by_outcome, ratio_quantiles
from gspo_dist.objectives.mismatch import mismatch_metrics
from gspo_dist.packing import MiniBatch
from gspo_dist.routing.trace import RoutingTrace, replay_bytes
from gspo_dist.types import Completion, Rollout

Metrics = Mapping[str, float]

COUNTS = ("objective/tokens", "objective/sequences")
"""Sums that are meant over the whole step; every other sum is of one mini-batch and is averaged over them."""
BY_MINI_BATCH = ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative", "approx_kl_k3")
AT_TOKEN = re.compile(r"@\d+$")
"""How the name of a part ends that is paid at a token."""
CORRECT_AT = 1.0
"""The reward from which a completion counts as right where its length is reported (all built-in rewards pay
0 or 1).
"""


@dataclass
class StepMetrics:
    """All numbers of a step, by where they come from. `row` joins them for the sinks."""

    rollouts: Metrics
    """rollout/*, reward/*, advantage/*: the batch that was collected."""
    packing: Metrics
    """packing/*: how the batch fills its micro-batches."""
    update: Metrics
    """objective/*, mismatch/*, staleness/*, learner/*: the mini-batches of learning."""
    old_logprobs: Metrics
    """old_logprobs/* and guard/*: where the old log-probs came from, and their offset."""
    routing: Metrics
    """routing/*: live flip rates, and what replay costs in bytes."""
    sync: Metrics = field(default_factory=dict)
    """sync/* and time/sync/*: the publication of the new weights."""
    pipeline: Metrics = field(default_factory=dict)
    """pipeline/*: what is begun of later steps."""
    speed: Metrics = field(default_factory=dict)
    """time/* and perf/*."""
    evaluation: Metrics = field(default_factory=dict)
    """eval/*: held-out metrics, where the step ended with an evaluation."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """A few rollouts as rows for samples.jsonl; not numbers, so not in `row`."""
    episodes: list[dict[str, Any]] = field(default_factory=list)
    """A few episodes as rows for episodes.jsonl, token by token."""

    def row(self) -> dict[str, float]:
        """All numbers as one mapping. Raises ValueError when two parts report one name: one would
        hide the other.
        """
        out: dict[str, float] = {}
        for part in (getattr(self, f.name) for f in fields(self) if f.name not in ("samples", "episodes")):
            twice = out.keys() & part.keys()
            if twice:
                raise ValueError(f"a step must report every metric once: got {min(twice)} from two parts")
            out |= part
        return out


def rollout_metrics(
    rollouts: Sequence[Rollout], advantages: np.ndarray, policy_version: int, mini_batches: int = 1
) -> dict[str, float]:
    """rollout/*, reward/* and advantage/* of a batch. policy_version: the learner's, before it learns
    from the batch. mini_batches: optimiser steps from one publication to the next.
    """
    rewards = np.array([r.reward for r in rollouts])
    lengths = np.array([len(r.completion) for r in rollouts])
    truncated = np.array([r.completion.finish_reason == "length" for r in rollouts])
    out = {
        "rollout/reward_mean": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std()),
        "rollout/completion_tokens_mean": float(lengths.mean()),
        "rollout/completion_tokens_max": float(lengths.max()),
        "rollout/truncated_fraction": float(truncated.mean()),
        "rollout/degenerate_group_fraction": degenerate_group_share(
            rewards, np.array([r.group_id for r in rollouts])
        ),
    }
    out |= age_metrics(rollouts, policy_version, mini_batches)
    out |= turn_metrics(rollouts)
    out |= advantage_statistics(advantages)
    out |= length_by_outcome(lengths, rewards >= CORRECT_AT)
    # What is paid at positions (objective.credit) has a name per token, which makes no curve.
    for key in sorted({key for r in rollouts for key in r.reward_parts if not AT_TOKEN.search(key)}):
        # These three come from the reward pool, and mean the share of rollouts that have them.
        name = f"reward/{key}_fraction" if key in ("timeout", "crash", "error") else f"reward/{key}"
        out[name] = float(np.mean([r.reward_parts.get(key, 0.0) for r in rollouts]))
    return out


def age_metrics(rollouts: Sequence[Rollout], policy_version: int, mini_batches: int) -> dict[str, float]:
    """How old the batch's trained tokens are when the learner, at `policy_version`, begins to learn.

    A tool's tokens have no age. Example: versions [4, 4, 8] of a completion at version 12 with 4 mini-batches
    are 8, 8 and 4 optimiser steps old: two publications at most, two versions in the completion.
    """
    versions = [r.completion.policy_versions[r.completion.loss_mask] for r in rollouts]
    ages = policy_version - np.concatenate(versions)
    each = [len(np.unique(v)) for v in versions]
    return {
        "rollout/staleness": float(ages.max()),
        "rollout/staleness_mean": float(ages.mean()),
        # Rounded up: a run that was resumed with other mini-batches has publications of either size.
        "rollout/staleness_publications": float(-(-int(ages.max()) // mini_batches)),
        "rollout/versions_per_completion": float(np.mean(each)),
        "rollout/versions_per_completion_max": float(max(each)),
    }


def length_metrics(config: RolloutConfig, step: int) -> dict[str, float]:
    """The token limit of the step's completions, in runs whose limit changes."""
    if not config.length_schedule:
        return {}
    return {"rollout/max_completion_tokens": float(config.completion_tokens(step))}


def turn_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """environment/* of a batch of episodes; empty without an environment.

    Example: episodes of 2 and 4 turns, of which the second failed, have 3 turns on average and half failed.
    """
    episodes = [r.completion for r in rollouts if r.completion.turns]
    if not episodes:
        return {}
    turns = [len(c.turns) - 1 for c in episodes]  # the first is the reset
    failures = [next((turn.failed for turn in c.turns if turn.failed), "") for c in episodes]
    tokens = sum(len(c) for c in episodes)
    return {
        "environment/turns_mean": float(np.mean(turns)),
        "environment/turns_max": float(max(turns)),
        "environment/token_fraction": 1.0 - sum(int(c.loss_mask.sum()) for c in episodes) / tokens,
        "environment/out_of_turns_fraction": float(np.mean([c.finish_reason == "turns" for c in episodes])),
        "environment/failed_fraction": float(np.mean([bool(failed) for failed in failures])),
        **{
            f"environment/{kind}_fraction": float(np.mean([failed == kind for failed in failures]))
            for kind in ("timeout", "crash", "error")
        },
    }


def turn_rows(completion: Completion) -> dict[str, Any]:
    """The turns of an episode for a reader: what was said and answered, what was paid, and of which policy
    versions the tokens are. Empty without an environment.
    """
    if not completion.turns:
        return {}
    rows = []
    for turn in completion.turns:
        versions = completion.policy_versions[turn.start : turn.end]
        row = {"said": turn.said, "answer": turn.observation, "reward": turn.reward}
        row |= {"tokens": turn.end - turn.start, "versions": sorted(set(versions.tolist()))}
        rows.append(row | ({"failed": turn.failed} if turn.failed else {}))
    return {"turns": rows}


def packing_metrics(mini_batches: Sequence[MiniBatch], token_budget: int) -> dict[str, float]:
    """packing/*: micro-batches of the step, and the share of their token budgets that holds tokens."""
    launched = sum(1 for mini in mini_batches for _ in mini.batches())
    held = sum(mini.num_tokens for mini in mini_batches)
    return {
        "packing/micro_batches": float(launched),
        "packing/efficiency": held / (launched * token_budget),
    }


def update_metrics(
    by_mini_batch: Sequence[Mapping[str, Stat]], optim: Sequence[OptimStep]
) -> dict[str, float]:
    """objective/*, mismatch/*, staleness/* and learner/* over the mini-batches of a step: their statistics
    and optimiser steps.

    Clip fractions are also reported by mini-batch, because off-policyness grows with its index.
    """
    stats = merge_stats([dict(s) for s in by_mini_batch])
    out = {
        name: value for name, value in results(stats).items() if not name.startswith(("mismatch/", "moment/"))
    }
    for name in [n for n, stat in stats.items() if n in out and stat.reduce == "sum" and n not in COUNTS]:
        out[name] /= len(optim)
    if "values/sequence_log_ratio" in stats:
        ratios = np.exp(stats["values/sequence_log_ratio"].value.numpy())
        out |= {f"objective/sequence_{name}": value for name, value in ratio_quantiles(ratios).items()}
    # Mean and mean square merge exactly over ranks and mini-batches; a reader wants mean
    # and standard deviation.
    mean, square = (
        out.pop("objective/sequence_log_ratio_mean"),
        out.pop("objective/sequence_log_ratio_square"),
    )
    out["objective/log_ratio_mean"] = mean
    out["objective/log_ratio_std"] = math.sqrt(max(square - mean * mean, 0.0))
    if "staleness/log_ratio_mean" in out:
        mean, square = out["staleness/log_ratio_mean"], out.pop("staleness/log_ratio_square")
        out["staleness/log_ratio_std"] = math.sqrt(max(square - mean * mean, 0.0))
    if any(name.startswith("mismatch/") for name in stats):
        out |= mismatch_metrics({n: s for n, s in stats.items() if n.startswith(("mismatch/", "moment/"))})
    for index, own in enumerate(by_mini_batch):
        for name in BY_MINI_BATCH:
            if f"objective/{name}" in own:
                out[f"objective/mini_batch_{index}/{name}"] = own[f"objective/{name}"].result()
    norms = [o.grad_norm for o in optim if not o.skipped]
    out["learner/grad_norm"] = sum(norms) / len(norms) if norms else math.nan
    out["learner/skipped_steps"] = float(len(optim) - len(norms))
    if optim[-1].loss_scale is not None:
        out["learner/loss_scale"] = optim[-1].loss_scale
    out["learner/lr"] = optim[-1].lr
    out["learner/policy_version"] = float(optim[-1].policy_version)
    return out


def replay_metrics(
    mode: str, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout], *, recomputed: bool
) -> dict[str, float]:
    """routing/replay_*: bytes of the traces that this step replays, by where they lie and travel;
    empty for `none`.

    R2's traces are in the mini-batches, R3's in the rollouts. recomputed: the step ran a pass
    for old log-probs.
    """
    if mode == "none":
        return {}
    held = (
        [batch.routing for mini in mini_batches for batch in mini.batches()]
        if mode == "r2"
        else [rollout.completion.routing for rollout in rollouts]
    )
    traces: list[RoutingTrace] = [trace for trace in held if trace is not None]
    total, tokens = sum(t.nbytes for t in traces), sum(len(t) for t in traces)
    cost = replay_bytes(mode, total, recompute_old_logprobs=recomputed)
    versions = [r.completion.policy_versions[r.completion.loss_mask] for r in rollouts]
    mixed = (
        {}
        if mode == "r2"
        else {"routing/replay_mixed_fraction": float(np.mean([len(np.unique(v)) > 1 for v in versions]))}
    )
    return mixed | {
        "routing/replay_bytes": float(total),
        "routing/replay_bytes_per_token": total / tokens,
        "routing/native_row_fraction": sum(t.unknown_rows for t in traces) / tokens,
        **{f"routing/replay_{kind}_bytes": float(count) for kind, count in asdict(cost).items()},
    }


def speed_metrics(
    times: Metrics, rollouts: Sequence[Rollout], tokens_seen: int, sampled: tuple[int, float]
) -> dict[str, float]:
    """time/* as given, and perf/*: tokens per second of the step, of sampling and of learning.

    tokens_seen: completion tokens of the whole run so far, this step's included. sampled: tokens that the
    engines sampled since the last step, for whichever steps, and the seconds in which they did.
    """
    completion = sum(len(r.completion) for r in rollouts)
    tokens, seconds = sampled
    return dict(times) | {
        "perf/tokens_per_s": completion / times["time/step_s"],
        "perf/collect_tokens_per_s": tokens / seconds if seconds else 0.0,
        "perf/update_tokens_per_s": sum(r.num_tokens for r in rollouts) / times["time/update_s"],
        "rollout/completion_tokens_total": float(tokens_seen),
    }


def sample_rows(rollouts: Sequence[Rollout], advantages: np.ndarray, count: int) -> list[dict[str, Any]]:
    """`count` rollouts as rows for samples.jsonl, evenly spaced over the batch."""
    if not count:
        return []
    places = np.unique(np.linspace(0, len(rollouts) - 1, num=min(count, len(rollouts)), dtype=int))
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
        | turn_rows(rollouts[i].completion)
        for i in places.tolist()
    ]
