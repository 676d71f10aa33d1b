"""A rough time for one step: FLOPs over achieved FLOP/s, bytes over achieved bandwidth.

Every guess has a name in `Assumptions`.

    decode step   max(bytes read / bandwidth, FLOPs / rate) + overhead, for c sequences on one engine
                  bytes = weights touched (a batch of c tokens meets a share 1 - (1 - k/E)^c of the experts)
                  + KV cache
    training      3 forward passes' FLOPs (4 with full recomputation) over ranks x TFLOP/s x MFU
    log-probs     1 forward pass, where old log-probs are recomputed or a reference is kept
    side passes   1 forward pass over the guard's subset, the flip sample and the sync's probe
    weight sync   all weights over a network card's achieved bandwidth

It orders layouts and finds the part that dominates. Expect it to be right within a factor of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload


@dataclass(frozen=True)
class Assumptions:
    """What is guessed."""

    megatron_mfu: float = 0.18
    """Share of a GPU's FLOP/s that Megatron trains at (model FLOPs utilisation).

    Published for Qwen3-30B-A3B: 0.31 to 0.40 on H20, a slow chip that is easily fed. H100s reach about
    half of that.
    """
    other_mfu: float = 0.08
    """The same of HF models under DeepSpeed or eager."""
    forward_mfu_gain: float = 1.3
    """How much faster per FLOP a forward pass alone is than training."""
    decode_bandwidth: float = 0.55
    """Share of memory bandwidth that decoding reaches."""
    decode_mfu: float = 0.35
    """Share of a GPU's FLOP/s that decoding large batches reaches."""
    decode_overhead_s: float = 0.006
    """Scheduling and sampling of one decode step."""
    tensor_parallel_overhead_s: float = 0.003
    """All-reduces of one decode step with tensor parallelism."""
    sync_bandwidth: float = 0.2
    """Share of a network card that a weight sync reaches, gathering and loading included."""
    tail_share: float = 0.05
    """Share of sequences that still decode when most have reached the mean length."""


ASSUMPTIONS = Assumptions()


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of one synchronous step."""

    collect_s: float
    """Sampling the completions."""
    logprobs_s: float
    """Old log-probs and those of the reference."""
    train_s: float
    """Forward and backward passes of all mini-batches."""
    sync_s: float
    """New weights to the engines."""
    tokens: float
    """Prompt and completion tokens of the step."""
    gpus: int
    """GPUs of learner and engines together."""
    guard_s: float = 0.0
    """The guard's subset, in a step that measures it."""
    flips_s: float = 0.0
    """The flip sample, averaged over the steps."""
    probe_s: float = 0.0
    """The learner's side of the weight sync's probe, averaged over the steps."""

    @property
    def side_s(self) -> float:
        """Forward passes beside the update and the log-probs."""
        return self.guard_s + self.flips_s + self.probe_s

    @property
    def total_s(self) -> float:
        return self.collect_s + self.logprobs_s + self.train_s + self.sync_s + self.side_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.total_s / self.gpus


def experts_touched(model: ModelShape, tokens: float) -> float:
    """Expected share of a layer's experts that `tokens` evenly routed tokens meet: 1 - (1 - k/E)^tokens."""
    if not model.num_experts:
        return 0.0
    return 1.0 - (1.0 - model.top_k / model.num_experts) ** tokens


def decode_step_s(
    model: ModelShape, engine: EngineLayout, gpu: Gpu, sequences: float, context: float, assume: Assumptions
) -> float:
    """Seconds of one decode step of one engine with `sequences` sequences of `context` tokens each."""
    dense = model.total - model.experts_total - (0 if model.tied else model.embedding)
    weights = engine.width * (dense + model.experts_total * experts_touched(model, sequences))
    cache = sequences * context * model.kv_bytes_per_token(engine.width)
    tp = engine.tensor_parallel
    read = (weights + cache) / (tp * gpu.hbm_gb_s * 1e9 * assume.decode_bandwidth)
    flops = sequences * (2.0 * model.active_without_embedding + 4.0 * model.layers * model.q * context)
    compute = flops / (tp * gpu.tflops * 1e12 * assume.decode_mfu)
    return (
        max(read, compute) + assume.decode_overhead_s + (assume.tensor_parallel_overhead_s if tp > 1 else 0.0)
    )


def collect_s(
    model: ModelShape,
    engine: EngineLayout,
    work: Workload,
    gpu: Gpu,
    concurrency: int,
    assume: Assumptions,
    *,
    prompts: int | None = None,
    samples: int | None = None,
) -> float:
    """Seconds to sample a step's completions: waves of `concurrency` sequences, then the longest alone.

    prompts, samples: other numbers of prompts and of completions per prompt than a step's.
    """
    prompts = prompts or work.run.rollout.prompts_per_step
    samples = samples or work.run.rollout.group_size
    each = math.ceil(prompts * samples / engine.engines)
    batch = max(1, min(each, concurrency))
    completion = work.mean_fill * work.run.rollout.max_completion_tokens
    context = work.mean_fill * work.run.rollout.max_prompt_tokens + completion / 2
    steps = each / batch * completion
    decode = steps * decode_step_s(model, engine, gpu, batch, context, assume)
    few = max(1.0, assume.tail_share * batch)
    tail = (work.run.rollout.max_completion_tokens - completion) * decode_step_s(
        model, engine, gpu, few, work.max_length, assume
    )
    # Siblings share a prefix, so a group's prompt is read once.
    prefill = each * work.mean_fill * work.run.rollout.max_prompt_tokens / samples
    rate = engine.tensor_parallel * gpu.tflops * 1e12 * assume.decode_mfu
    return (
        decode
        + tail
        + model.forward_flops(prefill, work.mean_fill * work.run.rollout.max_prompt_tokens) / rate
    )


def step_time(
    model: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    gpu: Gpu,
    concurrency: int,
    assume: Assumptions = ASSUMPTIONS,
) -> StepTime:
    """Estimates one synchronous step (collect, log-probs, mini-batches, weight sync, one after the other)."""
    mfu = assume.megatron_mfu if learner.backend == "megatron" else assume.other_mfu
    forward = model.forward_flops(work.tokens, work.mean_length)
    rate = learner.world_size * gpu.tflops * 1e12 * mfu
    passes = 4.0 if learner.recompute == "full" else 3.0
    gpus = (
        learner.world_size
        if engine.colocated
        else learner.world_size + engine.engines * engine.tensor_parallel
    )

    def forward_s(tokens: float) -> float:
        """A forward pass alone over sequences of the mean length."""
        return model.forward_flops(tokens, work.mean_length) / (rate * assume.forward_mfu_gain)

    return StepTime(
        collect_s=collect_s(model, engine, work, gpu, concurrency, assume) if engine.engines else 0.0,
        logprobs_s=work.forward_passes * forward_s(work.tokens),
        train_s=passes * forward / rate,
        sync_s=learner.width * model.total / (gpu.network_gb_s * 1e9 * assume.sync_bandwidth),
        tokens=work.tokens,
        gpus=gpus,
        guard_s=forward_s(work.guard_tokens),
        flips_s=forward_s(work.flip_tokens) if model.moe_layers else 0.0,
        probe_s=forward_s(work.probe_tokens),
    )
