"""What a planned run gains by beginning rollouts ahead, and which split of its GPUs suits that best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.pipeline import Lengths, Machine, Outcome, simulate
from gspo_dist.planner.throughput import Assumptions, StepTime, decode_step_s, step_time

SHOWN = (0, 1, 2, 3, 4)
"""Values of rollout.steps_ahead that a plan compares, beside the run's own."""
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

    A decode step's context is the mean prompt with half of the mean completion, as in `throughput.collect_s`.
    """
    prompt = work.mean_fill * work.run.rollout.max_prompt_tokens
    completion = work.mean_fill * work.run.rollout.max_completion_tokens
    places = max(1, min(places, engine.config.max_num_seqs or places))
    rate = engine.tensor_parallel * gpu.tflops * 1e12 * assume.decode_mfu
    return Machine(
        engines=engine.engines,
        places=places,
        step_s=[
            decode_step_s(model, engine, gpu, max(1, n), prompt + completion / 2, assume)
            for n in range(places + 1)
        ],
        learn_s=time.logprobs_s + time.train_s + time.side_s,
        publish_s=time.sync_s,
        prefill_s=model.forward_flops(1, prompt + completion / 2) / rate,
        prompt_tokens=round(prompt),
        colocated=engine.colocated,
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
    prompts = work.run.rollout.prompts_per_step
    groups = groups[: prompts * steps_needed(work, ahead)]
    return simulate(machine, groups, prompts, ahead, warm_up=ahead + 1, cool_down=ahead)


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
