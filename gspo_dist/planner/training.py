"""Seconds that the learner takes: micro-batches, pipeline slots, what each layer costs, the optimiser.

    a replica's sequences -> micro-batches of a token budget -> slots of the pipeline: m + (p - 1) / v
    a slot's forward pass = layers of a stage x (latency + exchanges of tokens and rows) + FLOPs over rate
    an update = 3 of them (4 with full recomputation) per slot, then gradients summed, and the optimiser

So small micro-batches cost latency, large ones FLOPs, and the share of FLOP/s that comes out is no constant.
Passes without an update have a token budget of their own. A pipeline gains little by a large one: it then has
few micro-batches to fill its stages with.
"""

from __future__ import annotations

import functools
import math

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.calibration import Assumptions
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.layout import LearnerLayout, Workload
from gspo_dist.planner.links import exchange_s, gather_s
from gspo_dist.planner.memory import rank_parameters
from gspo_dist.planner.pipeline import Lengths

SAMPLE = 192
"""Sequences that are packed to see how many micro-batches there are. More are taken in proportion."""
BACKWARD = 2.0
"""A backward pass over its forward pass, in FLOPs, in launches and in exchanges."""
ADAM_BYTES = 28
"""Bytes of an optimiser step per parameter in float32: weights, moments read and written, gradients read."""


@functools.lru_cache(maxsize=4096)
def packed(lengths: Lengths, prompt: float, sequences: int, budget: int) -> float:
    """Micro-batches of at most `budget` tokens that hold `sequences` sequences: the longest first, each to
    the first micro-batch with room for it.
    """
    taken = min(sequences, SAMPLE)
    room: list[float] = []
    for completion in reversed(lengths.quantiles(taken)):
        tokens = prompt + completion
        for i, left in enumerate(room):
            if left >= tokens:
                room[i] -= tokens
                break
        else:
            room.append(budget - tokens)
    return len(room) * sequences / taken


def micro_batches(work: Workload, sequences: int, budget: int) -> float:
    """Micro-batches of a replica that has so many sequences."""
    if work.unpacked is not None:
        return math.ceil(sequences / work.unpacked)
    return max(1.0, packed(work.lengths, work.mean_prompt, sequences, budget))


def layer_s(
    model: ModelShape, layout: LearnerLayout, gpu: Gpu, tokens: float, assume: Assumptions
) -> tuple[float, float]:
    """(an MoE layer, a dense layer): seconds of one forward pass beside its FLOPs.

    tokens: of the whole micro-batch.
    """
    host = assume.speed(gpu).host
    row = layout.width * model.hidden
    local = tokens / (layout.tensor * layout.context)
    # Tensor parallel ranks gather rows before both parts of a layer and scatter sums after them.
    both = 4 * gather_s(tokens / layout.context * row, layout.tensor, gpu, assume)
    # A ring passes the keys and values of the whole sequence on.
    keys = 2 * layout.width * model.kv * tokens / layout.tensor
    both += gather_s(keys, layout.context, gpu, assume)
    # Experts get their tokens and send them back.
    sent = local * model.top_k * row
    group = layout.expert * layout.expert_tensor
    away = 2 * exchange_s(sent * (group - 1) / group, group, gpu, assume)
    loop = 0.0 if layout.grouped else assume.expert_s * model.num_experts / layout.expert
    return (assume.layer_s + loop) * host + both + away, assume.dense_layer_s * host + both


def forward_slot_s(
    model: ModelShape,
    layout: LearnerLayout,
    gpu: Gpu,
    tokens: float,
    mean_length: float,
    assume: Assumptions,
) -> float:
    """Seconds of a pipeline stage's forward pass of a micro-batch of `tokens` tokens."""
    moe_s, dense_s = layer_s(model, layout, gpu, tokens, assume)
    layers = model.moe_layers * moe_s + (model.layers - model.moe_layers) * dense_s
    ranks = layout.tensor * layout.context
    rate = ranks * gpu.tflops * 1e12 * assume.speed(gpu).train
    if layout.backend != "megatron":
        rate *= assume.other_backends
        layers /= assume.other_backends
    products = model.forward_flops(tokens, mean_length) / rate
    share = 1 / layout.pipeline
    if any(layout.end_stages):  # all wait for the largest stage
        share = max(layout.stages(model.layers)) / model.layers
    seconds = (layers + products) * share
    if layout.zero_stage == 3:  # every pass gathers the weights that this rank lacks
        held = layout.width * rank_parameters(model, layout).all
        seconds += gather_s(held, layout.shards, gpu, assume)
    return seconds / assume.learner_speed


def recomputed(model: ModelShape, layout: LearnerLayout) -> float:
    """Share of a forward pass that the backward pass computes again: all, or that of whole modules."""
    if layout.recompute != "selective":
        return float(layout.recompute == "full")
    again, matrices = layout.recompute_modules, 0
    if "moe" in again:
        matrices += model.moe_layers * (model.top_k * model.expert + model.shared_expert)
    elif "shared_experts" in again:
        matrices += model.moe_layers * model.shared_expert
    if "mlp" in again:
        matrices += (model.layers - model.moe_layers) * model.dense_ffn
    return matrices / model.active_without_embedding


def slots(layout: LearnerLayout, count: float) -> float:
    """Micro-batches that a stage works or waits for."""
    return count + (layout.pipeline - 1) / layout.virtual_stages


def pass_s(
    model: ModelShape,
    layout: LearnerLayout,
    work: Workload,
    gpu: Gpu,
    sequences: float,
    assume: Assumptions,
    *,
    update: bool = False,
) -> float:
    """Seconds of one pass over `sequences` sequences of the mean length, dealt to all replicas."""
    if sequences <= 0:
        return 0.0
    each = max(1, math.ceil(sequences / layout.data))
    budget = layout.token_budget if update else layout.forward_budget
    count = micro_batches(work, each, budget)
    slot = forward_slot_s(model, layout, gpu, each * work.mean_length / count, work.mean_length, assume)
    share = min(1.0, sequences / layout.data / each)  # less than a sequence each: an average over steps
    units = 1.0 + BACKWARD + recomputed(model, layout) if update else 1.0
    return units * slots(layout, count) * slot * share


def optimizer_s(
    model: ModelShape, layout: LearnerLayout, gpu: Gpu, per_node: int, assume: Assumptions
) -> float:
    """Seconds of one optimiser step: gradients summed over replicas, the step itself, weights gathered."""
    held = rank_parameters(model, layout)
    summed = 0.0
    for count, ranks in ((held.dense, layout.shards), (held.experts, layout.expert_shards)):
        # Replicas of a weight are apart in the order of ranks, so they span nodes when the learner does.
        span = layout.world_size if ranks > 1 else 1
        gathered = gather_s((4 + layout.width) * count, span, gpu, assume)
        summed += gathered * (ranks - 1) / ranks
    shared = layout.zero_stage >= 1 or layout.distributed_optimizer
    shard = held.dense / layout.shards + held.experts / layout.expert_shards if shared else held.all
    if not layout.offload_optimizer:
        return (summed + ADAM_BYTES * shard / (gpu.hbm_gb_s * 1e9 * 0.7)) / assume.learner_speed
    # Gradients go to the host, new weights come back, and the host's memory is shared by its ranks.
    moved = (4 + layout.width) * shard / (gpu.pcie_gb_s * 1e9 * assume.pcie_share)
    ranks = min(layout.world_size, per_node)
    return (
        summed + moved + ADAM_BYTES * shard * ranks / (assume.host_adam_gb_s * 1e9)
    ) / assume.learner_speed
