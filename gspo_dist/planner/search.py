"""The fastest ways to use a cluster's GPUs for a run: layouts are listed, timed, and the best are simulated.

Three sieves, each on what the one before let through:

1. Every learner's layout of every size that its configuration and the run's own checks accept, and that fits
   its GPU. Of those of one size the fastest two go on, with the optimiser on the GPU and in host memory.
2. Every way to give the other GPUs to engines, and every number of steps ahead. A bound orders them: the
   parts of a step one after the other, or the slower of learner and engines where they overlap.
3. In that order, what `plan` says fits is simulated (gspo_dist/planner/pipeline.py), until enough are found.

Nothing that changes what is trained is touched: batch, lengths, precision and token budget stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gspo_dist.config import RunConfig
from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.ahead import draw, machine_of, steps_needed, steps_of
from gspo_dist.planner.calibration import ASSUMPTIONS, Assumptions
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload, read_run
from gspo_dist.planner.memory import engine_memory, learner_memory
from gspo_dist.planner.pipeline import Lengths, Outcome
from gspo_dist.planner.plan import Plan, Refusals, as_connected, as_measured, plan
from gspo_dist.planner.throughput import StepTime, step_time

DEGREES = (1, 2, 4, 8, 16)
"""Sizes of every kind of parallelism that are tried."""
ROOM = 0.05
"""Share of a GPU that a found learner leaves free: experts are not evenly busy, and memory fragments."""
SIMULATED = 30
"""Candidates that are simulated, at most."""
SPLITS = 16
"""Sizes of the learner that are tried, at most."""


@dataclass(frozen=True)
class Found:
    """One way to run it."""

    overrides: tuple[str, ...]
    """What the command line adds to the run that was searched."""
    plan: Plan
    """Its memory and the parts of its step."""
    outcome: Outcome
    """Its simulated steps."""
    tokens_per_s_per_gpu: float
    """Prompt and completion tokens over the simulated step, by GPU of the cluster."""

    @property
    def limit(self) -> str:
        """What would have to be faster for the step to be shorter."""
        time, engine = self.plan.step, self.plan.engine
        assert time is not None
        assert engine is not None
        parts = {"train": time.train_s, "log-probs": time.logprobs_s, "sync": time.sync_s}
        largest = max(parts, key=lambda name: parts[name])
        learner = f"learner, {largest} {parts[largest]:.0f} s"
        engines = f"engines, {engine.decoded} sequences at once"
        if self.outcome.steps_ahead == 0:
            return engines if time.collect_s > time.learn_s + time.pause_s else learner
        return engines if self.outcome.learner_idle > self.outcome.engine_idle else learner


@dataclass(frozen=True)
class _Candidate:
    """A configuration, and a bound of its seconds."""

    config: RunConfig
    overrides: tuple[str, ...]
    bound_s: float


def search(
    run: RunConfig,
    model: ModelShape,
    gpu: Gpu,
    nodes: int,
    gpus_per_node: int,
    *,
    refusals: Refusals = lambda layout: [],
    lengths: Lengths | None = None,
    most_ahead: int = 2,
    count: int = 10,
    assume: Assumptions = ASSUMPTIONS,
) -> list[Found]:
    """The fastest `count` that fit, the fastest first. Empty where nothing fits.

    refusals: the run's own check of a learner's layout.
    lengths: measured lengths of completions.
    most_ahead: steps that rollouts may be begun ahead, at most.
    """
    learner, _, work = read_run(run)
    work = replace(work, measured=lengths)
    gpu, assume, total = as_connected(run, gpu), as_measured(run, assume), nodes * gpus_per_node
    learners = {
        ranks: _fastest_learners(run, model, learner, work, gpu, ranks, refusals, assume)
        for ranks in [*_sizes(total), total]
    }
    candidates = sorted(
        _candidates(run, model, work, gpu, total, gpus_per_node, learners, most_ahead, assume),
        key=lambda c: c.bound_s,
    )
    groups = draw(work.lengths, work, steps_needed(work, most_ahead))
    found: list[Found] = []
    for candidate in candidates:
        planned = plan(candidate.config, model, gpu, nodes, gpus_per_node, refusals=refusals, lengths=lengths)
        if not planned.fits or planned.step is None or planned.engine is None:
            continue
        _, engine, _ = read_run(candidate.config)
        machine = machine_of(model, engine, work, gpu, planned.engine.decoded, planned.step, assume)
        outcome = steps_of(machine, groups, work, candidate.config.rollout.steps_ahead)
        rate = work.tokens / outcome.step_s / total
        found.append(Found(candidate.overrides, planned, outcome, rate))
        if len(found) == SIMULATED:
            break
    return sorted(found, key=lambda f: f.outcome.step_s)[:count]


def _sizes(total: int) -> list[int]:
    """Sizes of a learner beside engines: evenly spaced, or powers of two where there are few GPUs."""
    step = max(1, total // SPLITS)
    return list(range(step, total, step))


def _fastest_learners(
    run: RunConfig,
    model: ModelShape,
    learner: LearnerLayout,
    work: Workload,
    gpu: Gpu,
    ranks: int,
    refusals: Refusals,
    assume: Assumptions,
) -> list[tuple[LearnerLayout, tuple[str, ...]]]:
    """The fastest layouts of so many ranks that fit a GPU alone, one with and one without offload."""
    mini_batch = work.rollouts // run.mini_batches
    nobody = EngineLayout(dataclasses.replace(run.rollout, engine="reference"))
    best: dict[bool, tuple[float, LearnerLayout, tuple[str, ...]]] = {}
    for layout, overrides in _layouts(learner, ranks):
        if layout.data > mini_batch:
            continue
        if learner_memory(model, layout, gpu.memory, work=work)[0].free < ROOM * gpu.memory:
            continue
        seconds = step_time(model, layout, nobody, work, gpu, 1, assume).learn_s
        known = best.get(layout.offload_optimizer)
        if (known is None or seconds < known[0]) and not refusals(layout):
            best[layout.offload_optimizer] = (seconds, layout, overrides)
    return [(layout, overrides) for _, layout, overrides in best.values()]


def _layouts(learner: LearnerLayout, ranks: int) -> Iterator[tuple[LearnerLayout, tuple[str, ...]]]:
    """Every layout of so many ranks that the configuration accepts, with what the command line says of it."""
    section = learner.backend if learner.backend in ("megatron", "deepspeed") else ""
    for knobs in _knobs(learner.backend, ranks):
        inner = {section: dataclasses.replace(getattr(learner.config, section), **knobs)} if section else {}
        try:
            config = dataclasses.replace(learner.config, world_size=ranks, **inner)
        except ValueError:
            continue
        said = (f"learner.{section}.{name}={str(value).lower()}" for name, value in knobs.items())
        yield dataclasses.replace(learner, config=config), (f"learner.world_size={ranks}", *said)


def _knobs(backend: str, ranks: int) -> Iterator[dict[str, Any]]:
    sizes = [n for n in DEGREES if n <= ranks]
    if backend == "megatron":
        for tensor in sizes[:4]:
            for pipeline in sizes[:4]:
                for context in sizes[:3]:
                    if ranks % (tensor * pipeline * context):
                        continue
                    for expert in sizes:
                        for offload in (False, True):
                            yield {
                                "tensor_parallel": tensor,
                                "pipeline_parallel": pipeline,
                                "context_parallel": context,
                                "expert_parallel": expert,
                                "optimizer_cpu_offload": offload,
                            }
    elif backend == "deepspeed":
        for expert in sizes:
            for offload in (False, True):
                yield {"expert_parallel": expert, "offload_optimizer": offload}
    else:
        yield {}


def _candidates(
    run: RunConfig,
    model: ModelShape,
    work: Workload,
    gpu: Gpu,
    total: int,
    gpus_per_node: int,
    learners: dict[int, list[tuple[LearnerLayout, tuple[str, ...]]]],
    most_ahead: int,
    assume: Assumptions,
) -> Iterator[_Candidate]:
    """Learners with engines on the GPUs that are left, or on the same ones, for every steps_ahead."""
    for ranks, layouts in learners.items():
        for tensor in [n for n in DEGREES if n <= gpus_per_node]:
            colocated = ranks == total
            engines, rest = divmod(total if colocated else total - ranks, tensor)
            if not engines or rest:
                continue
            sampler = EngineLayout(
                dataclasses.replace(run.rollout, engines=engines, tensor_parallel=tensor), colocated
            )
            if sampler.problems(model):
                continue
            places = engine_memory(model, sampler, work, gpu.memory).decoded
            if not places:
                continue
            for layout, said in layouts:
                time = step_time(model, layout, sampler, work, gpu, places, assume)
                for ahead in range(most_ahead + 1):
                    config = _config(run, layout, sampler, ahead)
                    if config is not None:
                        engine_said = (f"rollout.engines={engines}", f"rollout.tensor_parallel={tensor}")
                        both = (f"rollout.steps_ahead={ahead}", f"cluster.colocated={str(colocated).lower()}")
                        yield _Candidate(
                            config, (*said, *engine_said, *both), _bound_s(time, ahead, colocated)
                        )


def _config(run: RunConfig, learner: LearnerLayout, engine: EngineLayout, ahead: int) -> RunConfig | None:
    """The run with another layout. None where its own checks refuse it."""
    try:
        rollout = dataclasses.replace(engine.config, steps_ahead=ahead)
        cluster = dataclasses.replace(run.cluster, colocated=engine.colocated)
        return dataclasses.replace(run, learner=learner.config, rollout=rollout, cluster=cluster)
    except ValueError:
        return None


def _bound_s(time: StepTime, ahead: int, colocated: bool) -> float:
    """About the least that a step can take: overlapped engines lose their tail, and wait for nobody."""
    if not ahead or colocated:
        return time.total_s
    return max(0.8 * time.collect_s, time.learn_s) + time.pause_s
