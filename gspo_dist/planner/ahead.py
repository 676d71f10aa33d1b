"""What a planned run gains by beginning rollouts ahead, and which split of its GPUs suits that best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.pipeline import Lengths, Machine, Outcome, simulate
from gspo_dist.planner.throughput import Assumptions, StepTime, decode_step_s, prefill_token_s, step_time

SHOWN = (0, 1, 2, 3, 4)
"""Values of rollout.steps_ahead that a plan compares, beside the run's own."""
ENOUGH, GROUPS = 512, 4
"""Rollouts of a simulated step, and groups of each engine, above which a simulation is thinned."""
FEW, MANY = 3, 8
"""Steps of a simulation that are counted: many where a step has few rollouts, and is soon simulated."""


@dataclass(frozen=True)
class Split:
    """GPUs dealt to learner and engines."""

    ranks: int
    """learner.world_size."""
    engines: int
    """rollout.engines."""
    step_s: float
    """Seconds per step."""


@dataclass(frozen=True)
class Ahead:
    """What the simulations say."""

    lengths: Lengths
    """Of the completions that were drawn."""
    outcomes: tuple[Outcome, ...]
    """One for each of SHOWN and for the run's own steps_ahead, the smallest first."""
    split_at: int
    """The steps_ahead of `splits`: the run's own, or 1 where that is 0."""
    splits: tuple[Split, ...]
    """Legal splits of the same number of GPUs, the fastest first. Empty for colocated engines."""


def machine_of(
    model: ModelShape,
    engine: EngineLayout,
    work: Workload,
    gpu: Gpu,
    places: int,
    time: StepTime,
    assume: Assumptions,
) -> Machine:
    """The planner's own numbers as the machine of a simulation.

    A decode step's context is the mean prompt and what a running completion has on average.
    """
    prompt = work.mean_prompt
    context = prompt + work.lengths.half_way
    places = max(1, min(places, engine.config.max_num_seqs or places))
    return Machine(
        engines=engine.engines,
        places=places,
        step_s=[decode_step_s(model, engine, gpu, max(1, n), context, assume) for n in range(places + 1)],
        learn_s=time.learn_s,
        publish_s=time.pause_s,
        prefill_s=prefill_token_s(model, engine, gpu, context, assume),
        prompt_tokens=round(prompt),
        colocated=engine.colocated,
    )


def thinning(work: Workload, engines: int) -> int:
    """How many rollouts one of a simulation stands for: a power of two, more than 1 for large steps.

    Each of a thinner step's sequences takes that many places. What the tail of a step is like stays, because
    every engine still has several groups.
    """
    prompts, factor = work.run.rollout.prompts_per_step, 1
    while work.rollouts >= 2 * factor * ENOUGH and not prompts % (2 * factor):
        if prompts < 2 * factor * GROUPS * engines:
            break
        factor *= 2
    return factor


def thinned(machine: Machine, factor: int) -> Machine:
    """A machine of which each sequence stands for `factor` of them."""
    places = max(1, machine.places // factor)
    last = len(machine.step_s) - 1
    return replace(
        machine,
        places=places,
        step_s=[machine.step_s[min(n * factor, last)] for n in range(places + 1)],
        prefill_s=machine.prefill_s * factor,
    )


def steps_needed(work: Workload, ahead: int) -> int:
    """Steps of a simulation: `ahead` + 1 to fill the engines, those that count, and `ahead` at the end."""
    return 2 * ahead + 1 + max(FEW, min(MANY, 4096 // work.rollouts))


def draw(lengths: Lengths, work: Workload, steps: int, seed: int = 0) -> list[list[int]]:
    """Lengths of the workload's groups for so many steps."""
    rollout = work.run.rollout
    return lengths.draw(rollout.prompts_per_step * steps, rollout.group_size, seed)


def steps_of(machine: Machine, groups: Sequence[Sequence[int]], work: Workload, ahead: int) -> Outcome:
    """A simulated run on the first of `groups`."""
    factor = thinning(work, machine.engines)
    prompts = work.run.rollout.prompts_per_step // factor
    groups = groups[: prompts * steps_needed(work, ahead)]
    return simulate(thinned(machine, factor), groups, prompts, ahead, warm_up=ahead + 1, cool_down=ahead)


def look_ahead(
    model: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    gpu: Gpu,
    places: int,
    assume: Assumptions,
    lengths: Lengths,
    *,
    steps_ahead: int,
    allowed: Callable[[LearnerLayout, EngineLayout], bool],
) -> Ahead:
    """Simulates the run for its own K and every K of SHOWN, and other splits of its GPUs for its own K.

    allowed: whether the run would accept a split and it fits.
    """
    groups = draw(lengths, work, steps_needed(work, max(*SHOWN, steps_ahead)))

    def outcome(ranks: LearnerLayout, engines: EngineLayout, ahead: int) -> Outcome:
        time = step_time(model, ranks, engines, work, gpu, places, assume)
        machine = machine_of(model, engines, work, gpu, places, time, assume)
        return steps_of(machine, groups, work, ahead)

    outcomes = tuple(outcome(learner, engine, ahead) for ahead in sorted({*SHOWN, steps_ahead}))
    split_at = steps_ahead or 1
    found = []
    for ranks, engines in _splits(learner, engine):
        if allowed(ranks, engines):
            seconds = outcome(ranks, engines, split_at).step_s
            found.append(Split(ranks.world_size, engines.engines, seconds))
    return Ahead(lengths, outcomes, split_at, tuple(sorted(found, key=lambda s: s.step_s)))


def _splits(learner: LearnerLayout, engine: EngineLayout) -> Iterator[tuple[LearnerLayout, EngineLayout]]:
    """Every split of the run's GPUs into engines of its size and a learner that its configuration accepts."""
    if engine.colocated:
        return
    gpus = learner.world_size + engine.engines * engine.tensor_parallel
    for engines in range(1, (gpus - 1) // engine.tensor_parallel + 1):
        ranks = learner.changed(world_size=gpus - engines * engine.tensor_parallel)
        if ranks is not None:
            yield ranks, replace(engine, config=replace(engine.config, engines=engines))
