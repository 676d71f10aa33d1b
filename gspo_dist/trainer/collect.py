"""Collecting a rollout batch: how a step is sampled, and its rollouts. pipeline.py has the engines' side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gspo_dist.config import ObjectiveConfig, RolloutConfig
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.trainer.checkpointing import save_again
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.run import Run
from gspo_dist.types import Rollout, SamplingSpec


def collect(run: Run, step: int) -> list[Rollout]:
    """The judged rollouts of step `step` (1 is the first), group after group, in the order of
    the prompt cursor.

    A part of them may have been sampled while the learner worked on earlier steps (`rollout.steps_ahead`).
    Raises what engines and rewards raise. Where no engine is left, what they had is saved before. A resumed
    run takes the same prompts again, because the checkpoint holds the cursor of the step before, and the
    rollouts that were begun since.
    """
    with run.clock("collect"):
        _sampled(run, step, run.collector.sample)
    while True:
        with run.clock("reward"):
            rollouts = run.collector.judged(step)
        if rollouts is not None:
            return rollouts
        with run.clock("collect"):
            _sampled(run, step, run.collector.try_again)


def _sampled(run: Run, step: int, sample: Callable[[int], None]) -> None:
    """Samples; where no engine is left, what they had is saved before that is raised."""
    try:
        sample(step)
    except NoEngineLeft:
        save_again(run, step - 1)
        raise


def sampling_of(
    sampling: SamplingSpec,
    objective: ObjectiveConfig,
    flips: FlipMeter,
    step: int,
    rollout: RolloutConfig | None = None,
) -> SamplingSpec:
    """How to sample `step`: routes travel only where R3 replays them or the flip metric measures them.

    rollout: whose length schedule says how long completions may be; None is without one.
    """
    wanted = objective.routing_replay == "r3" or flips.due(step)
    tokens = sampling.max_tokens if rollout is None else rollout.completion_tokens(step)
    return replace(sampling, record_routing=sampling.record_routing and wanted, max_tokens=tokens)
