"""Memory of one learner rank and one engine GPU, item by item. A host's is in host.py.

Learner states in bytes per parameter, for bf16 weights. d is the number of ranks that share a weight's
optimiser states, which differs between experts and other weights:

    eager       2 + 4 grads + 4 master + 8 moments                                              = 18
    megatron    2 + 4 grads + 12/d         (distributed optimiser; 12 without)                  = 6 + 12/d
    deepspeed   ZeRO 0: 2 + 2 + 12, and 4 while the optimiser steps
                ZeRO 1: 2 + 4 + 12/d
                ZeRO 2: 2 + 16/d
                ZeRO 3: 18/d + two gathered layers

DeepSpeed's gradients accumulate in float32 from stage 1 on.
Sources: the Megatron-core guide's table of its distributed optimiser, and ZeRO (arXiv 1910.02054, section 3).
Activations count the tensors that the backward pass keeps, with flash attention (no score matrix) and the
LM head in blocks (no logits). What is assumed rather than counted is named as a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.hardware import GIB
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload

RUNTIME_GPU = 3 * GIB
"""CUDA context, NCCL buffers and the allocator's fragments of a learner rank."""
RUNTIME_HOST = 1 * GIB
"""Interpreter and libraries of one process on a CPU host."""
ENGINE_RUNTIME = int(1.5 * GIB)
"""CUDA context and NCCL of an engine."""
CUDA_GRAPHS = 1 * GIB
"""Captured graphs of an engine."""
ENGINE_ASLEEP = 2 * GIB
"""What an engine that sleeps still holds."""
HEAD_LOGITS = 512 << 20
"""Logits that the LM head holds at once on a GPU (learners/head/logprobs.py)."""
HEAD_LOGITS_CPU = 32 << 20
"""The same on a CPU host."""
HEAD_KEPT = 1 << 30
"""Logits that it keeps for the backward pass, at most."""
HEAD_KEPT_CPU = 512 << 20
"""The same on a CPU host."""
EXPERT_SKEW = 1.25
"""Tokens of the busiest expert-parallel rank over the mean."""
ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's default reduce bucket. Two are in use."""


@dataclass(frozen=True)
class Item:
    """One line of a table."""

    name: str
    """What takes the memory."""
    bytes: int
    """How much it takes."""
    note: str = ""
    """What the number rests on, for the reader of the table."""


@dataclass(frozen=True)
class MemoryTable:
    """What one process or host needs, and what it may have."""

    owner: str
    """The process or host that the table is about."""
    items: tuple[Item, ...]
    """What is resident at the worst moment, all of it together."""
    capacity: int
    """Bytes that are there."""

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def free(self) -> int:
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0

    def bytes_of(self, name: str) -> int:
        return sum(item.bytes for item in self.items if item.name == name)


@dataclass(frozen=True)
class RankParameters:
    """Parameters that the fullest rank holds before any optimiser sharding."""

    dense: int
    """Attention, norms, routers, tables and dense feed-forward layers."""
    experts: int
    """Routed experts."""

    @property
    def all(self) -> int:
        return self.dense + self.experts


def rank_parameters(model: ModelShape, layout: LearnerLayout) -> RankParameters:
    """What the fullest rank holds.

    Megatron: its slice of a pipeline stage. The other backends: everything but the other ranks' experts.
    """
    if layout.backend != "megatron":
        return RankParameters(model.total - model.experts_total, model.experts_total // layout.expert)
    first, middle, last = layout.stages(model.layers)
    # With several stages, the first one's table or the last one's head (a copy of the table when tied).
    table = model.embedding + (model.head if layout.pipeline == 1 else 0)
    ends = _stage_parameters(model, layout, max(first, last), table)
    return max(ends, _stage_parameters(model, layout, middle, 0), key=lambda held: held.all)


def _stage_parameters(model: ModelShape, layout: LearnerLayout, layers: int, tables: int) -> RankParameters:
    """A rank of a pipeline stage of so many layers, which holds `tables` parameters beside them."""
    moe = math.ceil(model.moe_layers * layers / model.layers)
    split = layers * model.attention + moe * model.shared_expert + (layers - moe) * model.dense_ffn + tables
    whole = layers * model.norms + moe * model.router + model.hidden
    experts = moe * model.num_experts * model.expert // (layout.expert * layout.expert_tensor)
    return RankParameters(split // layout.tensor + whole, experts)


@dataclass(frozen=True)
class _Bytes:
    """Bytes per parameter."""

    weights: float
    """Of the weights that the forward pass uses."""
    gradients: float
    """Of the gradients as they accumulate."""
    optimizer: float
    """Of master weights and moments together."""


def _per_parameter(layout: LearnerLayout) -> _Bytes:
    half = layout.half
    if layout.backend == "megatron":
        if layout.low_precision_moments and half and not layout.offload_optimizer:
            # Whole float32 master weights and two moments (learners/megatron/optimizer.py).
            return _Bytes(2, 4, 4 + layout.moment_bytes)
        return _Bytes(layout.width, 4, 12 if half else 8)
    if layout.backend == "eager":
        return _Bytes(layout.width, 4, 12)
    zero = layout.zero_stage
    return _Bytes(layout.width, 4 if zero else layout.width, 12 if zero or half else 8)


def learner_states(model: ModelShape, layout: LearnerLayout) -> tuple[list[Item], list[Item]]:
    """Items on the device of the fullest rank, and its items in host memory (offload)."""
    params, per = rank_parameters(model, layout), _per_parameter(layout)
    shard = params.dense / layout.shards + params.experts / layout.expert_shards
    zero = layout.zero_stage if layout.backend == "deepspeed" else 0
    shared = zero >= 1 or (layout.backend == "megatron" and layout.distributed_optimizer)
    weights = shard if zero == 3 else params.all
    gradients = shard if zero >= 2 else params.all
    optimizer = shard if shared else params.all
    device: list[Item] = []
    host: list[Item] = []
    (host if layout.offload_params else device).append(Item("weights", round(per.weights * weights)))
    if layout.offload_optimizer:
        # The optimiser steps on the host: a float32 copy of the shard's gradients is there too.
        away = layout.offload_fraction
        host += [
            Item("optimizer", round(away * per.optimizer * optimizer)),
            Item("gradients", round(away * 4 * optimizer)),
        ]
        if zero < 2:
            device.append(Item("gradients", round(per.gradients * gradients)))
        elif away < 1:
            device.append(Item("gradients", round((1 - away) * per.gradients * gradients)))
        if away < 1:
            stays = round((1 - away) * per.optimizer * optimizer)
            device.append(Item("optimizer", stays, f"{1 - away:.0%} of the master weights and moments"))
    else:
        device += [
            Item("gradients", round(per.gradients * gradients)),
            Item("optimizer", round(per.optimizer * optimizer), "master weights and moments"),
        ]
    if layout.keep_reference:
        device.append(Item("reference", round(layout.width * weights), "frozen starting policy, for the KL"))
    if zero:
        bucket = layout.reduce_bucket or ZERO_BUCKET
        device.append(
            Item("buckets", 2 * layout.width * min(bucket, params.all), "DeepSpeed's communication")
        )
    if zero == 3:
        gathered = model.largest_layer - (
            model.num_experts * model.expert * (layout.expert - 1) // layout.expert if model.moe_layers else 0
        )
        device.append(Item("gathered", 2 * layout.width * gathered, "the layer in use and the next one"))
    return device, host


def checkpoint_bytes(model: ModelShape, layout: LearnerLayout) -> int:
    """Bytes of one checkpoint of the learner: weights, master weights and moments of every parameter once."""
    per = _per_parameter(layout)
    return round((per.weights + per.optimizer) * model.total)


def layer_activations(model: ModelShape, layout: LearnerLayout, moe: bool, recompute: str) -> float:
    """Bytes that one layer keeps for its backward pass, per token of the micro-batch.

    - Attention: residual and norm output (2h), q, k, v before and after their norm (2q + 3kv), its output
      (q), and one float32 log-sum-exp per head.
    - Feed-forward: residual and norm output (2h), gate, up and product (3I).
    - Experts: router logits and probabilities in float32 (8E), and for each of k experts input and output
      (2h), gate, up and product (3I).

    Selective recomputation drops norm outputs and the experts' product, or what its modules say: the output
    of attention (core_attn), all of a feed-forward part but its input (mlp, moe, shared_experts).
    """
    w, skew = layout.width, EXPERT_SKEW if layout.expert > 1 else 1.0
    again = layout.recompute_modules if recompute == "selective" else frozenset()
    kept_norms = 1 if "layernorm" in again else 2
    product = 2 if "moe_act" in again else 3
    qk = model.q + model.kv if model.qk_norm != "none" else 0
    attention = w * (kept_norms * model.hidden + 2 * model.q + 2 * model.kv + qk) + 4 * model.heads
    if "core_attn" in again:
        attention -= w * model.q + 4 * model.heads
    if not moe:
        return attention + w * (kept_norms * model.hidden + (0 if "mlp" in again else 3 * model.ffn))
    if "moe" in again:
        return attention + w * kept_norms * model.hidden
    shared = 0 if "shared_experts" in again else w * 3 * model.shared_ffn
    rows = model.top_k * w * (2 * model.hidden * layout.expert_tensor + product * model.expert_ffn) * skew
    return attention + w * kept_norms * model.hidden + 8 * model.num_experts + rows + shared


def activations(model: ModelShape, layout: LearnerLayout) -> Item:
    """What the fullest pipeline rank keeps from a forward to its backward pass, at `token_budget` tokens."""
    tokens = math.ceil(layout.token_budget / layout.context)
    moe = model.moe_layers > 0

    def layer(mode: str) -> float:
        return layer_activations(model, layout, moe, mode) * tokens / layout.tensor

    boundary = layout.width * model.hidden * tokens / layout.tensor
    on_rank = max(layout.stages(model.layers))
    # 1F1B: the first stage holds `pipeline` micro-batches; interleaving adds (p - 1) / (p v) of that.
    in_flight = float(layout.pipeline)
    if layout.virtual_stages > 1:
        in_flight *= 1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual_stages)
    if layout.recompute == "full":
        blocks = math.ceil(on_rank / layout.recompute_num_layers)
        kept = boundary * blocks * in_flight + layer("none") * layout.recompute_num_layers
    else:
        kept = layer(layout.recompute) * on_rank * in_flight
    return Item("activations", round(kept), f"{tokens:,} tokens, recompute {layout.recompute}")


def forward_activations(model: ModelShape, layout: LearnerLayout) -> list[Item]:
    """What a pass in which nothing is trained holds at `forward_token_budget` tokens: the layer under way,
    and the hidden states that the head reads.
    """
    tokens = math.ceil(layout.forward_budget / layout.context)
    layer = layer_activations(model, layout, model.moe_layers > 0, "none") * tokens / layout.tensor
    return [
        Item("activations", round(layer), f"{tokens:,} tokens, one layer of a pass without gradients"),
        Item("hidden states", layout.width * tokens * model.hidden, "those of the trained tokens"),
    ]


def router_scores(model: ModelShape, layout: LearnerLayout, work: Workload, budget: int | None = None) -> int:
    """Bytes that a rank's device holds of what the old policy's routers thought (objective rspo).

    Megatron's ranks hold those of a whole mini-batch, each of its own tokens and layers. The others hold one
    micro-batch at a time, of `budget` tokens (None: the token budget).
    """
    if not work.scored:
        return 0
    tokens: float = budget or layout.token_budget
    if layout.backend == "megatron":
        tokens = work.rollouts * work.max_length / work.run.mini_batches / layout.data
    ranks = layout.pipeline * layout.context * layout.tensor
    return round(model.score_bytes_per_token * tokens / ranks)


def learner_memory(
    model: ModelShape,
    layout: LearnerLayout,
    capacity: int,
    *,
    gpu: bool = True,
    work: Workload | None = None,
) -> tuple[MemoryTable, list[Item]]:
    """The fullest rank at its worst moment, and its items in host memory.

    The worst moment is in the backward pass, in the optimiser step, where scores of routers are put together,
    or in a pass without gradients, which may have more tokens.

    work: what else a rank keeps of a step depends on it. None is a step that needs nothing of it.
    """
    device, host = learner_states(model, layout)
    tokens = math.ceil(layout.token_budget / layout.context)
    block, most_kept = (HEAD_LOGITS, HEAD_KEPT) if gpu else (HEAD_LOGITS_CPU, HEAD_KEPT_CPU)
    kept = min(most_kept, layout.width * tokens * model.vocab // layout.tensor)
    head = Item(
        "head",
        block + kept + 4 * tokens * model.hidden,
        "a block of logits, those kept for the backward pass, and the hidden states' gradient in float32",
    )
    backward = [activations(model, layout), head]
    forward = [*forward_activations(model, layout), Item("head", block, "a block of logits")]
    step: list[Item] = []
    if layout.backend == "deepspeed" and layout.zero_stage == 0 and layout.half:
        step = [
            Item(
                "step", 4 * rank_parameters(model, layout).all, "float32 gradients while the optimiser steps"
            )
        ]
    recorded: list[Item] = []
    if work is not None and work.scored:
        scores = router_scores(model, layout, work)
        backward.append(Item("router scores", scores, "the old policy's, at the longest"))
        scores = router_scores(model, layout, work, layout.forward_budget)
        forward.append(Item("router scores", scores, "those that the pass records, at the longest"))
        # The layers' scores and, beside them, the whole that is made of them.
        recorded = [Item("router scores", 2 * scores, "the old policy's, at the longest, and a copy")]
    worst = max(backward, step, recorded, forward, key=lambda items: sum(i.bytes for i in items))
    runtime = Item("runtime", RUNTIME_GPU if gpu else RUNTIME_HOST, "context, buffers, fragments")
    return MemoryTable("learner rank", (*device, *worst, runtime), capacity), host


def engine_weights(model: ModelShape, engine: EngineLayout) -> int:
    """Bytes of weights on one GPU of an engine.

    Everything but norms and routers is split: experts whole or in slices. Heads of keys and values are
    copied where there are more GPUs than heads.
    """
    tp = engine.tensor_parallel
    whole = model.layers * model.norms + model.moe_layers * model.router + model.hidden
    copies = max(0, tp - model.kv_heads) * model.layers * 2 * model.hidden * model.head_dim
    return round(engine.width * ((model.total - whole + copies) / tp + whole))


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine, and what its KV cache holds."""

    table: MemoryTable
    """Its items, the KV cache among them."""
    kv_tokens: int
    """Tokens that the whole engine caches."""
    concurrency: int
    """Sequences of the longest length decoded at once."""
    concurrency_mean: int
    """Sequences of the assumed mean length decoded at once."""
    decoded: int
    """Sequences decoded at once on average: those that the cache holds when each has what it has half way."""


LEAST_SEQUENCES = 256
"""Sequences that an engine may always decode at once: vLLM makes those wait that its KV cache cannot hold."""


def sequences_at_once(
    model: ModelShape, engine: EngineLayout, mean_length: float, capacity: int, *, gpu: bool = True
) -> int:
    """What rollout.max_num_seqs stands for where it is null.

    As many sequences as the KV cache holds when each has half of its mean length, which is the average over
    the time that it decodes. vLLM puts the youngest back when the cache is full, and their prefill is cheap
    beside the decode steps that a larger batch saves. Never more than an engine's share of a step, never
    fewer than `LEAST_SEQUENCES`. Each sequence also takes a row of logits in the workspace.
    """
    chosen = engine.config.max_num_seqs
    if chosen is not None:
        return chosen
    if not gpu:
        return LEAST_SEQUENCES
    free = int(capacity * engine.config.gpu_memory_utilization)
    free -= sum(item.bytes for item in _engine_items(model, engine, 0))
    each = mean_length / 2 * _kv_bytes(model, engine) + _logit_bytes(model, engine)
    share = math.ceil(engine.config.rollouts_per_step / engine.config.engines)
    return max(LEAST_SEQUENCES, min(share, int(max(0, free) // each)))


def _kv_bytes(model: ModelShape, engine: EngineLayout) -> int:
    """KV cache of one token on one GPU of an engine."""
    heads = max(1, model.kv_heads / engine.tensor_parallel)
    return round(model.kv_bytes_per_token(engine.width) * heads / model.kv_heads)


def _logit_bytes(model: ModelShape, engine: EngineLayout) -> int:
    """Workspace of one sequence's row: logits, log-probs and their running sum in float32."""
    return 3 * 4 * model.vocab // engine.tensor_parallel


def _engine_items(model: ModelShape, engine: EngineLayout, sequences: int) -> list[Item]:
    """What one GPU of an engine holds beside its KV cache."""
    tokens = engine.max_batched_tokens
    inner = model.top_k * (3 * model.expert_ffn + model.hidden) if model.moe_layers else 3 * model.ffn
    scratch = 2 * tokens * (6 * model.hidden + 2 * model.q + inner // engine.tensor_parallel)
    scratch += sequences * _logit_bytes(model, engine)
    items = [
        Item("weights", engine_weights(model, engine)),
        Item("workspace", scratch, f"prefill of {tokens:,} tokens, logits of {sequences:,} sequences"),
        Item("runtime", ENGINE_RUNTIME),
    ]
    return items if engine.config.enforce_eager else [*items, Item("cuda_graphs", CUDA_GRAPHS)]


def engine_memory(
    model: ModelShape, engine: EngineLayout, work: Workload, capacity: int, *, gpu: bool = True
) -> EngineMemory:
    """KV tokens = (utilisation x memory - weights - workspace) / bytes per token.

    The numbers of sequences that follow from it are capped by max_num_seqs.
    """
    per_token = _kv_bytes(model, engine)
    at_once = sequences_at_once(model, engine, work.mean_length, capacity, gpu=gpu)
    if gpu:
        items = _engine_items(model, engine, at_once)
        budget = int(capacity * engine.config.gpu_memory_utilization)
    else:
        items = [Item("weights", engine_weights(model, engine)), Item("runtime", 2 * RUNTIME_HOST)]
        budget = sum(i.bytes for i in items) + int(engine.config.kv_cache_gib * GIB)
    free = budget - sum(i.bytes for i in items)
    kv_tokens = max(0, free // per_token)
    items.append(Item("kv_cache", kv_tokens * per_token, f"{kv_tokens:,} tokens of {per_token:,} bytes"))
    return EngineMemory(
        MemoryTable("engine GPU" if gpu else "engine", tuple(items), budget),
        kv_tokens,
        min(at_once, kv_tokens // work.max_length),
        min(at_once, int(kv_tokens // max(work.mean_length, 1))),
        min(at_once, int(kv_tokens // max(work.mean_prompt + work.lengths.half_way, 1))),
    )
