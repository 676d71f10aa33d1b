"""Collecting a rollout batch: which prompts, how they are sampled, and the rollouts that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gspo_dist.rewards.pool import RewardPool
from gspo_dist.trainer.run import Run
from gspo_dist.types import Completion, Prompt, Rollout, SamplingSpec


def collect(run: Run, step: int) -> list[Rollout]:
    """The judged rollouts of step `step` (1 is the first), group after group, in the order of
    the prompt cursor.

    Group and rollout ids count over the whole run: they seed the sampling, so a step's rollouts do not depend
    on how the run got there. Raises what engines and rewards raise; the cursor has moved then, and a resumed
    run takes the same prompts again because the checkpoint holds the cursor of the step before.
    """
    count = run.config.rollout.prompts_per_step
    first_group = (step - 1) * count
    with run.clock("collect"):
        prompts = run.cursor.next(count)
        groups = run.pool.generate(
            prompts, sampling_of(run, step), range(first_group, first_group + len(prompts))
        )
    with run.clock("reward"):
        return judged(run.rewards, prompts, groups, first_group)


def sampling_of(run: Run, step: int) -> SamplingSpec:
    """How to sample `step`: routes travel only where R3 replays them or the flip metric measures them."""
    wanted = run.config.objective.routing_replay == "r3" or run.flips.due(step)
    return replace(run.sampling, record_routing=run.sampling.record_routing and wanted)


def judged(
    rewards: RewardPool,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    first_group_id: int,
) -> list[Rollout]:
    """Sampled groups as rollouts with their rewards.

    Example: first_group_id 3 and two groups of 2 give group ids [3, 3, 4, 4] and rollout ids [6, 7, 8, 9].
    """
    size = len(groups[0])
    items = [
        ((first_group_id + g) * size + i, prompt, completion)
        for g, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for i, completion in enumerate(group)
    ]
    verdicts = rewards.judge(items)
    return [
        Rollout(rollout_id, first_group_id + n // size, prompt, completion, verdict.reward, verdict.parts)
        for n, ((rollout_id, prompt, completion), verdict) in enumerate(zip(items, verdicts, strict=True))
    ]
