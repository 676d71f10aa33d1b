"""What to change where a run does not fit: the cheapest change that is enough comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload

T = TypeVar("T")
Step = tuple[str, T]
"""An override of the command line, and the layout that it leads to."""


def nearest_change(
    start: T, steps: Callable[[T], Iterable[Step[T]]], room: Callable[[T], int], legal: Callable[[T], bool]
) -> str:
    """The first single change that fits, else a pile of changes, each the one that frees most.

    "" where no change helps.
    steps: named changes of a layout, the cheapest first.
    room: what is left over. A layout with a negative rest does not fit.
    legal: whether the run would accept a layout.
    """
    options = [(name, layout) for name, layout in steps(start) if legal(layout)]
    for name, layout in options:
        if room(layout) >= 0:
            return name
    names: list[str] = []
    current = start
    while options:
        name, best = max(options, key=lambda o: room(o[1]))
        if room(best) <= room(current):
            return ""
        names, current = [n for n in names if n.split("=")[0] != name.split("=")[0]] + [name], best
        if room(current) >= 0:
            return " ".join(names)
        options = [(n, layout) for n, layout in steps(current) if legal(layout)]
    return ""


def learner_steps(layout: LearnerLayout, work: Workload, gpus_per_node: int) -> Iterator[Step[LearnerLayout]]:
    """Changes of the learner's knobs that its configuration accepts, the least costly in speed first."""
    for section, knobs in _learner_knobs(layout, work, gpus_per_node):
        changed = layout.changed(section, **knobs)
        if changed is not None:
            prefix = f"learner.{section}." if section else "learner."
            yield " ".join(f"{prefix}{knob}={_written(v)}" for knob, v in knobs.items()), changed


def _written(value: object) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


Knobs = tuple[str | None, dict[str, Any]]
"""A section of the learner's configuration (None: its own fields), and the knobs to change in it."""


def _learner_knobs(layout: LearnerLayout, work: Workload, gpus_per_node: int) -> Iterator[Knobs]:
    if layout.forward_budget > layout.token_budget:
        yield None, {"forward_token_budget": None}
    if layout.token_budget // 2 >= work.max_length:
        yield None, {"token_budget": layout.token_budget // 2}
    if layout.backend == "megatron":
        yield from _megatron_knobs(layout, gpus_per_node)
        return
    if layout.recompute == "none":
        yield None, {"activation_checkpointing": True}
    if layout.backend == "deepspeed":
        yield from _deepspeed_knobs(layout)


def _megatron_knobs(layout: LearnerLayout, gpus_per_node: int) -> Iterator[Knobs]:
    section = "megatron"
    if not layout.distributed_optimizer:
        yield section, {"distributed_optimizer": True}
    yield section, {"expert_parallel": layout.expert * 2}
    if layout.recompute == "none":
        yield section, {"recompute": "selective"}
    if layout.recompute != "full":
        yield section, {"recompute": "full"}
    if layout.tensor * 2 <= gpus_per_node:
        yield section, {"tensor_parallel": layout.tensor * 2}
    yield section, {"context_parallel": layout.context * 2}
    yield section, {"pipeline_parallel": layout.pipeline * 2}
    # The last two need the distributed optimiser: the run refuses them without it.
    needed: dict[str, Any] = {} if layout.distributed_optimizer else {"distributed_optimizer": True}
    if not layout.low_precision_moments:
        yield section, {**needed, "precision_aware_optimizer": True}
    if not layout.offload_optimizer:
        yield section, {**needed, "optimizer_cpu_offload": True}


def _deepspeed_knobs(layout: LearnerLayout) -> Iterator[Knobs]:
    section = "deepspeed"
    for stage in range(layout.zero_stage + 1, 4):
        yield section, {"zero_stage": stage}
    yield section, {"expert_parallel": layout.expert * 2}
    if layout.zero_stage and not layout.offload_optimizer:
        yield section, {"offload_optimizer": True}


def engine_steps(layout: EngineLayout, gpus_per_node: int) -> Iterator[Step[EngineLayout]]:
    """Changes of the engines' knobs that leave more room for the KV cache. Colocated engines have none."""
    if layout.colocated:
        return
    knobs: list[tuple[str, Any]] = []
    if layout.config.gpu_memory_utilization < 0.9:
        knobs.append(("gpu_memory_utilization", 0.9))
    if layout.tensor_parallel * 2 <= gpus_per_node:
        knobs.append(("tensor_parallel", layout.tensor_parallel * 2))
    for knob, value in knobs:
        yield f"rollout.{knob}={value}", replace(layout, config=replace(layout.config, **{knob: value}))
