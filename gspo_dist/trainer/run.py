"""The state of a run: its parts, and what it counts. Nothing here acts; the verbs are in the
modules beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.config import RunConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.metrics.sinks import Sinks
from gspo_dist.objectives.objective import Objective
from gspo_dist.rewards.pool import RewardPool
from gspo_dist.rollout.pool import RolloutPool
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.health import Health
from gspo_dist.trainer.old_logprobs import OldLogprobs
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.trainer.profile import ProfileWindow
from gspo_dist.trainer.publisher import WeightPublisher
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.trainer.suites import RunSuites
from gspo_dist.types import Prompt, SamplingSpec


@dataclass(frozen=True)
class UnfinishedSave:
    """A checkpoint that ranks may still be writing."""

    folder: Path
    """Where it is written until it is whole."""
    step: int
    """The step whose state it holds."""
    state: dict[str, Any]
    """What its manifest will say besides."""


@dataclass
class Run:
    """Everything that a run is made of (setup/build.py makes it). The loop's verbs take it as
    their first argument.
    """

    config: RunConfig
    run_dir: Path
    learner: LearnerGroup
    pool: RolloutPool
    rewards: RewardPool
    collector: Collector
    """Samples the rollouts of every step, in the order of the prompt cursor."""
    suites: RunSuites
    """Benchmarks; there may be none."""
    heldout: Sequence[Prompt]
    """Prompts of the evaluation, never trained on; may be empty."""
    probe_prompts: Sequence[Prompt]
    """A few prompts whose completions the first log-prob probe compares."""
    objective: Objective
    """The bound objective: its loss, its advantages, its clip."""
    guard: OffsetGuard
    old_logprobs: OldLogprobs
    flips: FlipMeter
    publisher: WeightPublisher
    shared: SharedGpus
    """Says who has the GPUs, where learner and engines share them."""
    profile: ProfileWindow
    """Records the learner's ranks in the steps that were asked for."""
    sinks: Sinks
    health: Health
    """Counts what happens to the processes."""
    sampling: SamplingSpec
    """How training completions are sampled."""
    release: Callable[[], None]
    """Ends the processes that the run started. May be called once."""
    clock: StepClock = field(default_factory=StepClock)
    completed_steps: int = 0
    """Steps of the checkpoint that this process continues from; the next step is one more."""
    tokens_seen: int = 0
    """Completion tokens trained on so far, over the run's interruptions."""
    skipped_in_a_row: int = 0
    """Optimiser steps, up to the last one, that were skipped for a gradient that is not finite."""
    last_checkpoint: Path | None = None
    unfinished_save: UnfinishedSave | None = None
    first_evaluation: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the starting policy."""
    last_evaluation: dict[str, float] = field(default_factory=dict)
    """The newest held-out metrics."""
    started: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0
    """What the run took up to the checkpoint that it continues from."""

    @property
    def seconds(self) -> float:
        """Of the whole run, over its interruptions; what was lost with a kill is not counted."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.run_dir, self.config.checkpoint.keep)
