"""Seconds that engines take to sample.

decode step   max(bytes read / bandwidth, FLOPs / rate) + layers x latency, for n sequences on one engine
              bytes = weights touched (a batch of n tokens meets a share 1 - (1 - k/E)^n of the experts)
              + KV cache
a batch       while more wait than an engine decodes at once, its batch is full; then it empties as the
              lengths say: n(t) = n x (share of completions longer than t)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.calibration import Assumptions
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.layout import EngineLayout, Workload
from gspo_dist.planner.pipeline import Lengths

POINTS = 48
"""Points at which the emptying of a batch is looked at."""


def experts_touched(model: ModelShape, tokens: float) -> float:
    """Expected share of a layer's experts that `tokens` evenly routed tokens meet: 1 - (1 - k/E)^tokens."""
    if not model.num_experts:
        return 0.0
    return 1.0 - (1.0 - model.top_k / model.num_experts) ** tokens


def decode_step_s(
    model: ModelShape, engine: EngineLayout, gpu: Gpu, sequences: float, context: float, assume: Assumptions
) -> float:
    """Seconds of one decode step of one engine with `sequences` sequences of `context` tokens each."""
    speed, tp = assume.speed(gpu), engine.tensor_parallel
    dense = model.total - model.experts_total - (0 if model.tied else model.embedding)
    weights = engine.width * (dense + model.experts_total * experts_touched(model, sequences))
    # Heads of keys and values are copied where there are more GPUs than heads.
    cache = sequences * context * model.kv_bytes_per_token(engine.width) * max(1.0, tp / model.kv_heads)
    read = (weights + cache) / (tp * gpu.hbm_gb_s * 1e9 * speed.decode)
    flops = sequences * (2.0 * model.active_without_embedding + 4.0 * model.layers * model.q * context)
    compute = flops / (tp * gpu.tflops * 1e12 * assume.decode_mfu)
    launches = model.layers * assume.decode_layer_s * speed.host
    if tp > 1:  # one all-reduce after the attention and one after the feed-forward part
        launches += 2 * model.layers * (assume.reduce_s if tp <= gpu.nvlink_gpus else assume.reduce_far_s)
    return (max(read, compute) + launches) / assume.engine_speed


def prefill_token_s(
    model: ModelShape, engine: EngineLayout, gpu: Gpu, context: float, assume: Assumptions
) -> float:
    """Seconds to read one token of a sequence of `context` tokens."""
    rate = engine.tensor_parallel * gpu.tflops * 1e12 * assume.decode_mfu * assume.engine_speed
    return model.forward_flops(1, context) / rate


def batch_s(each: int, places: int, lengths: Lengths, step_s: Callable[[float, float], float]) -> float:
    """Seconds until an engine has sampled `each` completions, at most `places` at once.

    step_s: seconds of a decode step of n sequences that have so many tokens on average.
    """
    width = lengths.limit / POINTS
    grid = [(i + 0.5) * width for i in range(POINTS)]
    alive = [lengths.survival(t) for t in grid]
    if each > places:
        # The renewal theorem: what is left of a running completion when the last one begins is distributed
        # as the integral of the survival function, and so is what it already has.
        left, behind = [], 0.0
        for share in reversed(alive):
            left.append((behind + share / 2) * width / lengths.mean)
            behind += share
        alive = [min(1.0, share) for share in reversed(left)]
        had = sum(share * width for share in alive)
        seconds = (each * lengths.mean / places - had) * step_s(places, had)
        emptying = zip(grid, alive, strict=True)
        return seconds + sum(_alive_s(places, share, had + t, step_s) * width for t, share in emptying)
    return sum(_alive_s(each, share, t, step_s) * width for t, share in zip(grid, alive, strict=True))


def _alive_s(count: int, share: float, tokens: float, step_s: Callable[[float, float], float]) -> float:
    """Seconds of a decode step of those of `count` sequences that are left, or its share of one."""
    some = 1.0 - (1.0 - share) ** count
    return some * step_s(max(1.0, count * share), tokens) if some > 1e-6 else 0.0


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
    """Seconds to sample a step's completions, `concurrency` of them at once on each engine.

    prompts, samples: other numbers of prompts and of completions per prompt than a step's.
    """
    prompts = prompts or work.run.rollout.prompts_per_step
    samples = samples or work.run.rollout.group_size
    each = math.ceil(prompts * samples / engine.engines)

    def step_s(sequences: float, tokens: float) -> float:
        return decode_step_s(model, engine, gpu, sequences, work.mean_prompt + tokens, assume)

    # Siblings share a prefix, so a group's prompt is read once.
    prefill = each * work.mean_prompt / samples
    return batch_s(each, max(1, min(each, concurrency)), work.lengths, step_s) + prefill * prefill_token_s(
        model, engine, gpu, work.mean_prompt, assume
    )
