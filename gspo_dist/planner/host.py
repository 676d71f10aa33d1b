"""Memory of one host, item by item: what its ranks and engines keep beside their GPUs, and a step's data.

What lies in /dev/shm counts here too, because it is the same memory: Ray's object store, and the buckets of a
weight sync that stays on the host. Constants are bytes that were measured; benchmarks/reports/checkpoint.md
and tests/unit/planner/test_objects.py say on what.
"""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.hardware import GIB
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.memory import Item, MemoryTable, engine_weights, learner_states, rank_parameters

SAVE_EXTRA = 8
"""Host memory of a Megatron rank that saves, in bytes per parameter that it holds: pieces of the states, and
their copies on the way to the file."""
LOAD_BYTES = 4
"""Host memory of a DeepSpeed rank that starts at ZeRO 0 to 2, in bytes per parameter that it holds. Loading
takes one parameter at a time. Where a GPU has no room for a second copy, DeepSpeed (0.19.8) takes the bf16
parameters back to the host and lays them end to end there."""
PINNED_ROUNDING = 1 / 3
"""What torch's rounding of pinned blocks up to a power of two adds, as a share (torch 2.13; the blocks of
Qwen3-30B-A3B: 0.27 to 0.33)."""
TOKEN_BYTES = 54
"""Host memory of a rollout's token beside its route: 17 in the completion (id, mask, log-prob, version), 29
in the packed batch (those, position and advantage), 8 for log-probs that the learner computes."""
HOST_BASE = 8 * GIB
"""Operating system, Ray and its object store on one host."""
SENT_BYTES = 37
"""Of those, what travels to the learner: the packed batch with both kinds of log-probs. Every rank copies its
tensors out of the object store. Routes are read where they lie."""


def sleeping_engines(model: ModelShape, engine: EngineLayout, gpus: int) -> tuple[Item, ...]:
    """Weights that colocated engines move to host memory while the learner works (vLLM's sleep, level 1).

    gpus: those of one host. The memory is pinned, and torch keeps it when they wake, so it is there during a
    sync as well. `host_memory` counts what rounding adds to it.
    """
    if not engine.colocated:
        return ()
    here = min(engine.engines, gpus // engine.tensor_parallel)
    held = engine_weights(model, engine) * engine.tensor_parallel * here
    return (Item("sleeping engines", held, f"weights of {here} engines"),)


def parked_learner(model: ModelShape, layout: LearnerLayout) -> list[Item]:
    """What one rank moves to host memory while colocated engines sample.

    Gradients are zero by then, and zeros are not copied (learners/parking.py).
    """
    device, _ = learner_states(model, layout)
    kept = ("weights", "optimizer", "reference")
    return [Item(f"parked {item.name}", item.bytes) for item in device if item.name in kept]


def step_copies(model: ModelShape, work: Workload, layout: LearnerLayout, ranks: int) -> tuple[Item, ...]:
    """Copies of a mini-batch while the learner has it: in the object store, and in each of `ranks` ranks.

    R3 attaches a copy of the rollouts' routes, which is stored once more. Under R2 every rank of a replica
    records its replica's routes, and those that one of them returns pass through the store. Router scores
    (objective rspo) travel as tensors do. m2po's pass is packed out of what has its routes already, which
    copies them once more.
    """
    tokens = work.rollouts * work.max_length / work.run.mini_batches
    row, replay = model.trace_bytes_per_token, work.run.objective.routing_replay
    sent = SENT_BYTES + work.scored * model.score_bytes_per_token
    stored = sent + row * 2 * (replay in ("r2", "r3"))
    if layout.config.forward_token_budget is not None and work.asks_again and replay in ("r2", "r3"):
        stored += row
    share = ranks / layout.data
    items = [
        Item("object store", round(tokens * stored), "a mini-batch on its way to the learner, in /dev/shm"),
        Item("ranks' batches", round(tokens * share * sent), f"{ranks} ranks, copied out of the store"),
    ]
    if replay == "r2" and row:
        items.append(Item("recorded routes", round(tokens * share * row), f"R2: {ranks} ranks, twins too"))
    return tuple(items)


def rollout_bytes(model: ModelShape, work: Workload) -> int:
    """Bytes of a step's rollouts at the longest: routes, router scores, `TOKEN_BYTES` for all else."""
    row = model.trace_bytes_per_token if work.trace_sets else 0
    row += work.scored * model.score_bytes_per_token
    return work.rollouts * work.max_length * (row + TOKEN_BYTES)


def passing_host_bytes(model: ModelShape, layout: LearnerLayout) -> Item | None:
    """What one rank takes in host memory for a time: while it loads, or while it saves a checkpoint."""
    if layout.backend == "megatron":
        extra = SAVE_EXTRA * rank_parameters(model, layout).all
        return Item("saving", extra, f"a checkpoint, {SAVE_EXTRA} bytes per held parameter")
    if layout.backend == "deepspeed" and layout.zero_stage < 3:
        extra = LOAD_BYTES * rank_parameters(model, layout).all
        return Item("loading", extra, f"{LOAD_BYTES} bytes per held parameter, where DeepSpeed lays them out")
    return None


def host_memory(
    model: ModelShape,
    work: Workload,
    width: int,
    offloaded: list[Item],
    ranks: int,
    capacity: int,
    residents: tuple[Item, ...] = (),
    asleep: tuple[Item, ...] = (),
    passing: Item | None = None,
    parked: Sequence[Item] = (),
    copies: tuple[Item, ...] = (),
) -> MemoryTable:
    """The fullest host: two weight-sync buckets, the step's rollouts and routes, its ranks' offloaded states.

    width: bytes per weight that travels.
    offloaded: items of one rank in host memory. The host holds those of `ranks` ranks.
    residents: processes that live in host memory whole (a CPU host).
    asleep: what engines that sleep keep here (`sleeping_engines`).
    parked: what one rank keeps here while they are awake (`parked_learner`).
    copies: of a step's data (`step_copies`).
    passing: what one rank takes for a time (`passing_host_bytes`).
    """
    # A tensor larger than a bucket travels alone. Experts travel one by one, so the largest is the embedding.
    bucket = max(work.bucket_bytes, width * model.embedding)
    items = [
        Item("base", HOST_BASE if not residents else HOST_BASE // 4, "system, Ray, object store"),
        Item(
            "weight_sync",
            2 * min(bucket, width * model.total),
            "two buckets, in /dev/shm where they stay on the host",
        ),
    ]
    held = TOKEN_BYTES * work.rollouts * work.max_length
    items.append(Item("rollouts", held, f"{TOKEN_BYTES} bytes per token, at the longest"))
    row = model.trace_bytes_per_token
    if work.trace_sets and row:
        note = f"{row} bytes per token, at the longest" + (
            "; the engines' and R2's" if work.trace_sets > 1 else ""
        )
        items.append(Item("routing", work.trace_sets * work.rollouts * work.max_length * row, note))
    if row := work.scored * model.score_bytes_per_token:
        held = row * work.rollouts * work.max_length
        items.append(Item("router scores", held, f"{row} bytes per token, at the longest"))
    away = [Item(f"offloaded {i.name}", i.bytes * ranks, f"{ranks} ranks") for i in offloaded]
    away += [Item(i.name, i.bytes * ranks, f"{ranks} ranks, while engines sample") for i in parked]
    items += copies
    items += away
    pinned = 0 if residents else sum(i.bytes for i in (*away, *asleep))
    if pinned:
        items.append(Item("pinned rounding", round(PINNED_ROUNDING * pinned), "torch's blocks of 2^n bytes"))
    if passing is not None:
        items.append(Item(passing.name, passing.bytes * ranks, f"{ranks} ranks: {passing.note}"))
    return MemoryTable("host", (*items, *asleep, *residents), capacity)
