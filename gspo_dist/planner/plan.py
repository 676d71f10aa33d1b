"""Does a run fit, what is the nearest change if it does not, and about how long is a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gspo_dist.config import RunConfig
from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.advice import engine_steps, learner_steps, nearest_change
from gspo_dist.planner.ahead import Ahead, look_ahead
from gspo_dist.planner.hardware import GIB, Gpu, gib
from gspo_dist.planner.host import (
    host_memory,
    parked_learner,
    passing_host_bytes,
    sleeping_engines,
    step_copies,
)
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload, read_run
from gspo_dist.planner.memory import (
    ENGINE_ASLEEP,
    ENGINE_RUNTIME,
    RUNTIME_GPU,
    EngineMemory,
    Item,
    MemoryTable,
    engine_memory,
    engine_weights,
    learner_memory,
)
from gspo_dist.planner.pipeline import Lengths
from gspo_dist.planner.placement import engine_nodes, gpu_problems
from gspo_dist.planner.throughput import ASSUMPTIONS, Assumptions, StepTime, step_time
from gspo_dist.planner.timeouts import Timeout, timeouts

Refusals = Callable[[LearnerLayout], list[str]]
"""What a run would refuse of a learner's layout, in its own words."""

GPU_HOST_GIB, CPU_HOST_GIB = 1536.0, 16.0
"""Memory of one host where the caller names none."""


@dataclass(frozen=True)
class Plan:
    """The verdict on one run."""

    model: ModelShape
    """The model that was planned."""
    gpu: Gpu | None
    """The kind of GPU. None for a CPU host."""
    nodes: int
    """Hosts."""
    gpus_per_node: int
    """GPUs per host."""
    learner: MemoryTable
    """The fullest rank of the learner. It has no items where the layout was refused."""
    engine: EngineMemory | None
    """One GPU of an engine. None without engines and where the layout was refused."""
    host: MemoryTable
    """The fullest host."""
    step: StepTime | None = None
    """A rough time. None where nothing can be said (a CPU host, no engine, no room for a sequence)."""
    timeouts: tuple[Timeout, ...] = ()
    """What the run's timeouts allow, against what is predicted. Empty where `step` is None."""
    ahead: Ahead | None = None
    """What rollouts begun ahead gain. None where it was not asked for, the run does not fit, or `step` is."""
    problems: tuple[str, ...] = ()
    """Why it does not fit, one line per reason. None when it fits."""
    advice: tuple[str, ...] = ()
    """The nearest change for each problem that memory causes."""
    notes: tuple[str, ...] = ()
    """What is legal and slow."""

    @property
    def fits(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Planned:
    """What the checks below share."""

    run: RunConfig
    model: ModelShape
    learner: LearnerLayout
    engine: EngineLayout
    work: Workload
    gpu: Gpu | None
    nodes: int
    gpus_per_node: int
    host_bytes: int
    refusals: Refusals

    @property
    def capacity(self) -> int:
        """Bytes that one process may use: a GPU's memory, or a CPU host's."""
        return self.gpu.memory if self.gpu else self.host_bytes


@dataclass
class _Findings:
    """Problems and advice, gathered in the order in which they are shown."""

    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def plan(
    run: RunConfig,
    model: ModelShape,
    hardware: Gpu | None,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    host_gib: float | None = None,
    *,
    assume: Assumptions = ASSUMPTIONS,
    refusals: Refusals = lambda layout: [],
    lengths: Lengths | None = None,
    ahead: bool = False,
) -> Plan:
    """Works out memory and time of a run.

    hardware: None plans a CPU host, where every process lives in host memory and no time is estimated.
    gpus_per_node: None takes the GPU's own number.
    host_gib: memory of one host; None takes `plan.host_gib`, or 1.5 TiB for a GPU host and 16 GiB for a CPU
    host.
    refusals: the run's own check of a learner's layout against the model and the machine.
    lengths: measured lengths of completions. None takes `plan.length_mean`, or half of the limit, with the
    spread `plan.length_spread`.
    ahead: also simulate what rollouts begun ahead gain, which takes about a second.
    """
    p = _gather(run, model, hardware, nodes, gpus_per_node, host_gib, refusals, lengths)
    hardware, assume = p.gpu, as_measured(run, assume)
    refused = refusals(p.learner) + (p.engine.problems(model) if p.engine.engines else [])
    if refused:  # sizes that do not divide have no memory table worth showing
        nothing = MemoryTable("learner rank", (), p.capacity), None, MemoryTable("host", (), p.host_bytes)
        return Plan(model, hardware, nodes, p.gpus_per_node, *nothing, problems=tuple(refused))
    table, offloaded = learner_memory(model, p.learner, p.capacity, gpu=hardware is not None, work=p.work)
    sampled = None
    if p.engine.engines:
        sampled = engine_memory(model, p.engine, p.work, p.capacity, gpu=hardware is not None)
    host = _host(p, table, sampled, offloaded)
    found = _check_memory(p, table, sampled, host, offloaded)
    step: StepTime | None = None
    limits: tuple[Timeout, ...] = ()
    if hardware is not None and sampled is not None and sampled.decoded > 0:
        step = step_time(model, p.learner, p.engine, p.work, hardware, sampled.decoded, assume)
        limits = timeouts(run, step)
        if not found.problems:  # the times of a run that does not fit are not worth a timeout
            _check_timeouts(limits, found)
    return Plan(
        model,
        hardware,
        nodes,
        p.gpus_per_node,
        table,
        sampled,
        host,
        step,
        limits,
        _ahead(p, sampled, assume) if ahead and step is not None and not found.problems else None,
        tuple(found.problems),
        tuple(found.advice),
        tuple(_notes(p, sampled)),
    )


def _gather(
    run: RunConfig,
    model: ModelShape,
    gpu: Gpu | None,
    nodes: int,
    gpus_per_node: int | None,
    host_gib: float | None,
    refusals: Refusals,
    lengths: Lengths | None,
) -> _Planned:
    """The arguments of `plan` with its defaults filled in."""
    learner, engine, work = read_run(run)
    if lengths is not None:
        work = replace(work, measured=lengths)
    gpu = gpu and as_connected(run, gpu)
    if gpus_per_node is None:
        gpus_per_node = gpu.gpus_per_node if gpu else learner.world_size
    if host_gib is None:
        host_gib = run.plan.host_gib
    if host_gib is None:
        host_gib = GPU_HOST_GIB if gpu else CPU_HOST_GIB
    host_bytes = int(host_gib * GIB)
    return _Planned(run, model, learner, engine, work, gpu, nodes, gpus_per_node, host_bytes, refusals)


def as_connected(run: RunConfig, gpu: Gpu) -> Gpu:
    """The GPU on the network that the run's plan names."""
    given = run.plan.network_gb_s
    return gpu if given is None else replace(gpu, network_gb_s=given)


def as_measured(run: RunConfig, assume: Assumptions) -> Assumptions:
    """What is assumed, at the speeds that the run's plan gives its learner and its engines."""
    plan = run.plan
    return replace(
        assume,
        learner_speed=assume.learner_speed * plan.learner_speed,
        engine_speed=assume.engine_speed * plan.engine_speed,
    )


def _ahead(p: _Planned, sampled: EngineMemory | None, assume: Assumptions) -> Ahead:
    """Simulations of the run, and of other splits of its GPUs that it would accept and that fit."""
    assert p.gpu is not None  # a step has a time only on GPUs with engines
    assert sampled is not None
    mini_batch = p.work.rollouts // p.run.mini_batches

    def allowed(learner: LearnerLayout, engine: EngineLayout) -> bool:
        unplaced = engine.engines > len(engine_nodes(learner, engine, p.nodes, p.gpus_per_node))
        if unplaced or learner.data > mini_batch or p.refusals(learner):
            return False
        return learner_memory(p.model, learner, p.capacity, work=p.work)[0].fits

    return look_ahead(
        p.model,
        p.learner,
        p.engine,
        p.work,
        p.gpu,
        sampled.decoded,
        assume,
        p.work.lengths,
        steps_ahead=p.run.rollout.steps_ahead,
        allowed=allowed,
    )


def _host(
    p: _Planned, table: MemoryTable, sampled: EngineMemory | None, offloaded: list[Item]
) -> MemoryTable:
    """The fullest host: of a CPU host all processes, of a GPU host what its ranks keep beside their GPUs."""
    ranks = p.learner.world_size if p.gpu is None else min(p.learner.world_size, p.gpus_per_node)
    common = (p.model, p.work, p.learner.width, offloaded, ranks, p.host_bytes)
    copies = step_copies(p.model, p.work, p.learner, ranks)
    if p.gpu is not None:
        return host_memory(
            *common,
            asleep=sleeping_engines(p.model, p.engine, p.gpus_per_node),
            passing=passing_host_bytes(p.model, p.learner),
            parked=parked_learner(p.model, p.learner) if p.engine.colocated else (),
            copies=copies,
        )
    residents = [Item("learner ranks", table.total * ranks, f"{ranks} processes")]
    if sampled is not None:
        engines = p.engine.engines * p.engine.tensor_parallel  # each worker is a process
        residents.append(Item("engines", sampled.table.total * engines, f"{engines} processes"))
    return host_memory(*common, residents=tuple(residents), copies=copies)


def _host_advice(p: _Planned, offloaded: list[Item]) -> str:
    if p.gpu is not None and p.engine.colocated:
        offload = ", turn optimiser offload off" if offloaded else ""
        return (
            f"raise rollout.tensor_parallel with fewer engines{offload}, or take hosts with more memory or "
            "more hosts"
        )
    if offloaded:
        return "spread the learner's ranks over more hosts, or turn optimiser offload off"
    if p.gpu is not None:
        return "lower rollout.prompts_per_step, or take hosts with more memory"
    return "lower learner.token_budget, rollout.kv_cache_gib, learner.world_size or rollout.engines"


def _check_memory(
    p: _Planned, table: MemoryTable, sampled: EngineMemory | None, host: MemoryTable, offloaded: list[Item]
) -> _Findings:
    """Whether the run finds its GPUs, and room on them and on the fullest host."""
    found = _Findings()
    if p.gpu is not None:
        found.problems += gpu_problems(p.learner, p.engine, p.nodes, p.gpus_per_node)
        _check_learner(p, table, found)
        if sampled is not None:
            _check_engine(p, sampled, found)
    else:
        found.problems += _check_cpu(p.engine)
    if not host.fits:
        found.problems.append(f"host: needs {gib(host.total)} and has {gib(host.capacity)}")
        found.advice.append(_host_advice(p, offloaded))
    return found


def _check_cpu(engine: EngineLayout) -> list[str]:
    """What a CPU host cannot do at all."""
    problems = []
    if engine.colocated:
        problems.append(
            "cluster.colocated needs GPUs (engines sleep to free their memory): got a CPU host; unset it, "
            "or give plan.gpu to plan a GPU host"
        )
    return problems


def _check_learner(p: _Planned, table: MemoryTable, found: _Findings) -> None:
    """Whether the fullest rank fits, alone and beside a colocated engine."""
    colocated = p.engine.colocated

    def room(layout: LearnerLayout) -> int:
        """Bytes left at the tightest moment, negative when it does not fit."""
        free = learner_memory(p.model, layout, p.capacity, work=p.work)[0].free
        return min(free - ENGINE_ASLEEP, *_shared_room(p, layout)) if colocated else free

    if room(p.learner) >= 0:
        return
    largest = max(table.items, key=lambda i: i.bytes)
    where = " beside a colocated engine" if colocated else ""
    found.problems.append(
        f"learner: a rank lacks {gib(-room(p.learner))}{where} ({gib(table.total)} of {gib(p.capacity)}; "
        f"the largest part is {largest.name}, {gib(largest.bytes)})"
    )
    changes = nearest_change(
        p.learner,
        lambda layout: learner_steps(layout, p.work, p.gpus_per_node),
        room,
        lambda layout: not p.refusals(layout),
    )
    found.advice.append(
        f"learner: {changes}" if changes else "learner: more ranks (learner.world_size), or a smaller model"
    )


def _shared_room(p: _Planned, layout: LearnerLayout) -> tuple[int, int]:
    """Bytes left of a shared GPU while the engine samples, and during a publication.

    The learner's states are in host memory then, and its weights are on the GPU for the publication alone.
    """
    sampling = p.capacity - RUNTIME_GPU - int(p.capacity * p.engine.config.gpu_memory_utilization)
    weights = sum(i.bytes for i in parked_learner(p.model, layout) if i.name == "parked weights")
    both = weights + engine_weights(p.model, p.engine) + 2 * p.work.bucket_bytes
    return sampling, p.capacity - RUNTIME_GPU - ENGINE_RUNTIME - both


def _check_engine(p: _Planned, sampled: EngineMemory, found: _Findings) -> None:
    """Whether an engine's KV cache holds the longest sequence."""

    def room(layout: EngineLayout) -> int:
        return engine_memory(p.model, layout, p.work, p.capacity).kv_tokens - p.work.max_length

    if room(p.engine) >= 0:
        return
    found.problems.append(
        f"engine: its KV cache holds {sampled.kv_tokens:,} tokens and the longest sequence has "
        f"{p.work.max_length:,} (weights take {gib(sampled.table.bytes_of('weights'))} of "
        f"{gib(sampled.table.capacity)})"
    )
    changes = nearest_change(
        p.engine,
        lambda layout: engine_steps(layout, p.gpus_per_node),
        room,
        lambda layout: not layout.problems(p.model),
    )
    fallback = "shorten rollout.max_completion_tokens, or take GPUs with more memory"
    found.advice.append(f"engine: {changes or fallback}")


def _check_timeouts(limits: Sequence[Timeout], found: _Findings) -> None:
    """Timeouts that would end the run while all is well."""
    for limit in limits:
        if limit.fires:
            found.problems.append(
                f"{limit.knob} would end the run: {limit.allowed_s:,.0f} s are allowed, and {limit.what} "
                f"needs about {limit.predicted_s:,.0f} s"
            )
            found.advice.append(limit.advice)


def _notes(p: _Planned, sampled: EngineMemory | None) -> Iterator[str]:
    """What is legal and slow."""
    learner, engine = p.learner, p.engine
    if learner.not_counted:
        yield f"not counted, neither in memory nor in time: {', '.join(learner.not_counted)}"
    if learner.config.deterministic:
        yield "learner.deterministic takes slower kernels and more of their workspace: neither is counted"
    if learner.tensor > p.gpus_per_node:
        yield f"tensor_parallel {learner.tensor} crosses nodes: slow; keep it at {p.gpus_per_node} or below"
    if learner.expert * learner.expert_tensor > p.gpus_per_node:
        yield f"experts are spread over {learner.expert} ranks, so tokens cross nodes in every MoE layer"
    if p.model.num_experts and learner.backend != "megatron" and learner.expert == 1 and p.model.total > 5e9:
        yield "without expert parallelism every rank computes all experts of a layer"
    if sampled is not None and engine.engines:
        each = p.work.rollouts / engine.engines
        at_once = sampled.decoded
        if 0 < at_once < each:
            yield (
                f"an engine decodes about {at_once} of its {each:.0f} rollouts at once: "
                f"{each / at_once:.1f} waves"
            )
