"""Does a run fit, what is the nearest change if it does not, and about how long is a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.hardware import GIB, Gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.memory import (
    ENGINE_ASLEEP,
    EngineMemory,
    Item,
    MemoryTable,
    engine_memory,
    host_memory,
    learner_memory,
    learner_states,
    sleeping_engines,
)
from gspo_dist.planner.placement import engine_nodes
from gspo_dist.planner.throughput import ASSUMPTIONS, Assumptions, StepTime, step_time

T = TypeVar("T")
Refusals = Callable[[LearnerLayout], list[str]]
"""What a run would refuse of a learner's layout, in its own words."""


@dataclass(frozen=True)
class Plan:
    """The verdict on one run. `problems` are empty when it fits; `advice` has the nearest change for each."""

    model: ModelShape
    gpu: Gpu | None
    nodes: int
    gpus_per_node: int
    learner: MemoryTable
    engine: EngineMemory | None
    host: MemoryTable
    step: StepTime | None
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


def plan(
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    model: ModelShape,
    hardware: Gpu | None,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    host_gib: float | None = None,
    assume: Assumptions = ASSUMPTIONS,
    refusals: Refusals | None = None,
) -> Plan:
    """Works out memory and time of a run.

    hardware: None plans a CPU host, where every process lives in host memory and no time is estimated.
    gpus_per_node: None takes the GPU's own. host_gib: memory of one host; None takes 1.5 TiB for a GPU host and 16 GiB
    for a CPU host. refusals: the run's own check of the learner's layout; None: `LearnerLayout.problems`.
    """
    gpu = hardware is not None
    if gpus_per_node is None:
        gpus_per_node = hardware.gpus_per_node if hardware else learner.world_size
    host_bytes = int((host_gib if host_gib is not None else (1536 if gpu else 16)) * GIB)
    capacity = hardware.memory if hardware else host_bytes
    refused = refusals or (lambda layout: [f"learner: {p}" for p in layout.problems(model)])
    problems = refused(learner) + (engine.problems(model) if engine.engines else [])
    if problems:  # sizes that do not divide have no memory table worth showing
        learner_table = MemoryTable("learner rank", (), capacity)
        return Plan(
            model,
            hardware,
            nodes,
            gpus_per_node,
            learner_table,
            None,
            MemoryTable("host", (), host_bytes),
            None,
            tuple(problems),
            (),
            (),
        )
    table, offloaded = learner_memory(model, learner, capacity, gpu=gpu)
    sampled = engine_memory(model, engine, work, capacity, gpu=gpu) if engine.engines else None
    host = _host(
        model,
        learner,
        engine,
        work,
        table,
        sampled,
        offloaded,
        host_bytes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
    )
    advice: list[str] = []
    if gpu:
        problems += _check_gpus(learner, engine, nodes, gpus_per_node)
        found, suggestions = _check_learner(model, learner, engine, work, table, gpus_per_node, refused)
        problems, advice = problems + found, advice + suggestions
        if sampled is not None:
            found, suggestions = _check_engine(model, engine, work, sampled, capacity, gpus_per_node)
            problems, advice = problems + found, advice + suggestions
    else:
        problems += _check_cpu(engine)
    if not host.fits:
        problems.append(f"host: needs {_gib(host.total)} and has {_gib(host.capacity)}")
        advice.append(_host_advice(offloaded, engine, gpu=gpu))
    if learner.token_budget < work.max_length:
        problems.append(
            f"learner: token_budget {learner.token_budget} does not hold a sequence of {work.max_length}"
        )
        advice.append(f"learner.token_budget={work.max_length}")
    step = None
    if hardware is not None and sampled is not None and sampled.concurrency_mean > 0:
        step = step_time(model, learner, engine, work, hardware, sampled.concurrency_mean, assume)
    return Plan(
        model,
        hardware,
        nodes,
        gpus_per_node,
        table,
        sampled,
        host,
        step,
        tuple(problems),
        tuple(advice),
        tuple(_notes(model, learner, engine, work, sampled, gpus_per_node)),
    )


def _host(
    model: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    table: MemoryTable,
    sampled: EngineMemory | None,
    offloaded: list[Item],
    capacity: int,
    *,
    gpus_per_node: int,
    gpu: bool,
) -> MemoryTable:
    if gpu:
        ranks = min(learner.world_size, gpus_per_node)
        asleep = sleeping_engines(model, engine)
        return host_memory(model, work, learner.width, offloaded, ranks, capacity, asleep=asleep)
    residents = [Item("learner ranks", table.total * learner.world_size, f"{learner.world_size} processes")]
    if sampled is not None:
        residents.append(Item("engines", sampled.table.total * engine.engines, f"{engine.engines} processes"))
    return host_memory(model, work, learner.width, offloaded, learner.world_size, capacity, tuple(residents))


def _host_advice(offloaded: list[Item], engine: EngineLayout, *, gpu: bool) -> str:
    if gpu and engine.colocated:  # one host: nothing can be spread
        return f"lower rollout.engines{', turn optimiser offload off' if offloaded else ''}, or take a host with more memory"
    if offloaded:
        return "spread the learner's ranks over more hosts, or turn optimiser offload off"
    if gpu:
        return "lower rollout.prompts_per_step, or take hosts with more memory"
    return "lower learner.token_budget, rollout.kv_cache_gib, learner.world_size or rollout.engines"


def _check_gpus(learner: LearnerLayout, engine: EngineLayout, nodes: int, gpus_per_node: int) -> list[str]:
    if engine.colocated:
        return _check_colocation(learner, engine, gpus_per_node)
    needed = learner.world_size + engine.engines * engine.tensor_parallel
    unplaced = engine.engines - len(engine_nodes(learner, engine, nodes, gpus_per_node))
    problems = []
    if needed > nodes * gpus_per_node:
        problems.append(
            f"GPUs: learner.world_size {learner.world_size} and {engine.engines} engines of "
            f"{engine.tensor_parallel} need {needed}, and {nodes} x {gpus_per_node} are there"
        )
    if engine.tensor_parallel > gpus_per_node:
        problems.append(f"GPUs: an engine of {engine.tensor_parallel} does not fit a node of {gpus_per_node}")
    if unplaced and not problems:  # enough GPUs, but not on one node
        problems.append(
            f"GPUs: {unplaced} of {engine.engines} engines find no node with {engine.tensor_parallel} free GPUs beside "
            f"learner.world_size {learner.world_size} on {nodes} x {gpus_per_node}; add a node, or choose sizes that "
            "fill whole nodes"
        )
    return problems


def _check_colocation(learner: LearnerLayout, engine: EngineLayout, gpus_per_node: int) -> list[str]:
    problems = []
    if learner.world_size > gpus_per_node:
        problems.append(
            "GPUs: cluster.colocated shares the GPUs of one host: got learner.world_size "
            f"{learner.world_size} and {gpus_per_node} GPUs a node; lower it, or set cluster.colocated=false"
        )
    if engine.tensor_parallel > 1 or engine.engines > learner.world_size:
        problems.append(
            "GPUs: colocated engines take one GPU each, at most one a learner rank: got "
            f"{engine.engines} engines of {engine.tensor_parallel} and {learner.world_size} ranks"
        )
    return problems


def _check_cpu(engine: EngineLayout) -> list[str]:
    problems = []
    if engine.engines and engine.tensor_parallel > 1:
        problems.append(
            f"rollout.tensor_parallel must be 1 on a CPU host: got {engine.tensor_parallel}; raise rollout.engines, or "
            "give plan.gpu to plan a GPU host"
        )
    if engine.colocated:
        problems.append(
            "cluster.colocated needs GPUs (engines sleep to free their memory): got a CPU host; unset it, "
            "or give plan.gpu to plan a GPU host"
        )
    return problems


def _check_learner(
    model: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    table: MemoryTable,
    gpus_per_node: int,
    refused: Refusals,
) -> tuple[list[str], list[str]]:
    capacity = table.capacity

    def room(layout: LearnerLayout) -> int:
        """Bytes left at the tightest moment; negative when it does not fit."""
        free = learner_memory(model, layout, capacity)[0].free - (ENGINE_ASLEEP if engine.colocated else 0)
        if engine.colocated:  # while engines sample, the learner's states stay
            resident = sum(i.bytes for i in learner_states(model, layout)[0])
            free = min(free, capacity - resident - int(capacity * engine.gpu_memory_utilization))
        return free

    if room(learner) >= 0:
        return [], []
    largest = max(table.items, key=lambda i: i.bytes)
    where = " beside a colocated engine" if engine.colocated else ""
    problem = (
        f"learner: a rank lacks {_gib(-room(learner))}{where} ({_gib(table.total)} of {_gib(capacity)}; "
        f"the largest part is {largest.name}, {_gib(largest.bytes)})"
    )
    changes = nearest_change(
        learner,
        lambda layout: list(_learner_steps(layout, work, gpus_per_node)),
        room,
        lambda layout: not refused(layout),
    )
    advice = (
        f"learner: {changes}" if changes else "learner: more ranks (learner.world_size), or a smaller model"
    )
    return [problem], [advice]


def _check_engine(
    model: ModelShape,
    engine: EngineLayout,
    work: Workload,
    sampled: EngineMemory,
    capacity: int,
    gpus_per_node: int,
) -> tuple[list[str], list[str]]:
    def room(layout: EngineLayout) -> int:
        return engine_memory(model, layout, work, capacity).kv_tokens - work.max_length

    if room(engine) >= 0:
        return [], []
    problem = (
        f"engine: its KV cache holds {sampled.kv_tokens:,} tokens and the longest sequence has "
        f"{work.max_length:,} (weights take {_gib(sampled.table.bytes_of('weights'))} of "
        f"{_gib(sampled.table.capacity)})"
    )

    def steps(layout: EngineLayout) -> list[tuple[str, EngineLayout]]:
        out = []
        if layout.gpu_memory_utilization < 0.9 and not layout.colocated:
            out.append(("rollout.gpu_memory_utilization=0.9", replace(layout, gpu_memory_utilization=0.9)))
        if layout.tensor_parallel * 2 <= gpus_per_node and not layout.colocated:
            tp = layout.tensor_parallel * 2
            out.append((f"rollout.tensor_parallel={tp}", replace(layout, tensor_parallel=tp)))
        return out

    changes = nearest_change(engine, steps, room, lambda layout: not layout.problems(model))
    fallback = "shorten rollout.max_completion_tokens, or take GPUs with more memory"
    return [problem], [f"engine: {changes or fallback}"]


def nearest_change(
    start: T, steps: Callable[[T], list[tuple[str, T]]], room: Callable[[T], int], legal: Callable[[T], bool]
) -> str:
    """The first single change that fits, else the shortest pile of changes, each the one that frees most; '' if none.

    steps: named changes of a layout, cheapest first. room: what is left over; negative does not fit.
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


def _learner_steps(
    layout: LearnerLayout, work: Workload, gpus_per_node: int
) -> Iterator[tuple[str, LearnerLayout]]:
    """Changes of one knob, in the order of what they cost in speed."""
    if layout.token_budget // 2 >= work.max_length:
        half = layout.token_budget // 2
        yield f"learner.token_budget={half}", replace(layout, token_budget=half)
    if layout.backend != "megatron":
        yield from _deepspeed_steps(layout)
        return
    knob = "learner.megatron."
    if not layout.distributed_optimizer:
        yield f"{knob}distributed_optimizer=true", replace(layout, distributed_optimizer=True)
    ep, tp = layout.expert * 2, layout.tensor * 2
    yield f"{knob}expert_parallel={ep}", replace(layout, expert=ep)
    if layout.recompute == "none":
        yield f"{knob}recompute=selective", replace(layout, recompute="selective")
    if layout.recompute != "full":
        yield f"{knob}recompute=full", replace(layout, recompute="full")
    if tp <= gpus_per_node:
        yield f"{knob}tensor_parallel={tp}", replace(layout, tensor=tp)
    cp, pp = layout.context * 2, layout.pipeline * 2
    yield f"{knob}context_parallel={cp}", replace(layout, context=cp)
    yield f"{knob}pipeline_parallel={pp}", replace(layout, pipeline=pp)
    # The last two need the distributed optimiser: the run refuses them without it.
    needed = "" if layout.distributed_optimizer else f"{knob}distributed_optimizer=true "
    shared = replace(layout, distributed_optimizer=True)
    if not layout.low_precision_moments:
        yield f"{needed}{knob}precision_aware_optimizer=true", replace(shared, low_precision_moments=True)
    if not layout.offload_optimizer:
        yield f"{needed}{knob}optimizer_cpu_offload=true", replace(shared, offload_optimizer=True)


def _deepspeed_steps(layout: LearnerLayout) -> Iterator[tuple[str, LearnerLayout]]:
    if layout.recompute == "none":
        yield "learner.activation_checkpointing=true", replace(layout, recompute="full")
    if layout.backend != "deepspeed":
        return
    knob = "learner.deepspeed."
    for stage in range(layout.zero_stage + 1, 4):
        yield f"{knob}zero_stage={stage}", replace(layout, zero_stage=stage)
    ep = layout.expert * 2
    yield f"{knob}expert_parallel={ep}", replace(layout, expert=ep)
    if layout.zero_stage and not layout.offload_optimizer:
        yield f"{knob}offload_optimizer=true", replace(layout, offload_optimizer=True)


def _notes(
    model: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    sampled: EngineMemory | None,
    gpus_per_node: int,
) -> Iterator[str]:
    if learner.tensor > gpus_per_node:
        yield f"tensor_parallel {learner.tensor} crosses nodes: slow; keep it at {gpus_per_node} or below"
    if learner.expert * learner.expert_tensor > gpus_per_node:
        yield f"experts are spread over {learner.expert} ranks, so tokens cross nodes in every MoE layer"
    if model.num_experts and learner.backend != "megatron" and learner.expert == 1 and model.total > 5e9:
        yield "without expert parallelism every rank computes all experts of a layer"
    if sampled is not None and engine.engines:
        each = work.rollouts / engine.engines
        at_once = sampled.concurrency_mean
        if 0 < at_once < each:
            yield (
                f"an engine decodes about {at_once} of its {each:.0f} rollouts at once: {each / at_once:.1f} waves"
            )


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


def format_plan(result: Plan) -> str:
    """The plan as text."""
    model = result.model
    where = f"{result.nodes} x {result.gpus_per_node} {result.gpu.name}" if result.gpu else "CPU host"
    unit, name = (1e9, "B") if model.total >= 1e9 else (1e6, "M")
    size = f"{model.total / unit:.3f} {name} parameters, {model.active / unit:.3f} {name} active"
    cache = f"KV cache {model.kv_bytes_per_token():,} bytes a token (bf16)"
    lines = [f"{model.name}: {size}; {cache}", f"on {where}", ""]
    for table in (result.learner, result.engine.table if result.engine else None, result.host):
        if table is not None and table.items:
            lines += [*_format_table(table), ""]
    if result.engine:
        lines.append(
            f"an engine caches {result.engine.kv_tokens:,} tokens: {result.engine.concurrency} sequences of the "
            f"longest length, {result.engine.concurrency_mean} of the mean"
        )
    if result.step:
        s = result.step
        lines.append(
            f"about {s.total_s:.0f} s a step: collect {s.collect_s:.0f}, log-probs {s.logprobs_s:.0f}, train "
            f"{s.train_s:.0f}, weight sync {s.sync_s:.0f}; {s.tokens_per_s_per_gpu:,.0f} tokens/s a GPU "
            "(rough: see gspo_dist/planner/throughput.py for what is assumed)"
        )
    lines += [f"note: {note}" for note in result.notes]
    lines += ["", "fits" if result.fits else "does not fit"]
    lines += [f"  {problem}" for problem in result.problems]
    lines += [f"  try {advice}" for advice in result.advice]
    return "\n".join(lines)


def _format_table(table: MemoryTable) -> list[str]:
    lines = [f"{table.owner}: {_gib(table.total)} of {_gib(table.capacity)}"]
    for item in table.items:
        lines.append(f"  {item.name:<22}{_gib(item.bytes):>12}  {item.note}".rstrip())
    return lines
