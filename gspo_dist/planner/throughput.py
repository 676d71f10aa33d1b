"""The time of one step, part by part.

    sampling       gspo_dist/planner/decode.py
    passes         gspo_dist/planner/training.py: log-probs, the update, the side passes
    weight sync    a latency per tensor, and all weights over one network card (separate engines) or over the
                   cards of each node (colocated)
    colocation     the engines' weights and the learner's states to host memory and back
    checkpoint, evaluation   their seconds over the steps between two of them
    driver         a constant, and a constant per rollout

What is assumed stands in gspo_dist/planner/calibration.py. How far it is from published runs stands in
benchmarks/reports/planner.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gspo_dist.models.shape import ModelShape
from gspo_dist.planner.calibration import ASSUMPTIONS, Assumptions, GpuSpeed
from gspo_dist.planner.decode import collect_s, decode_step_s, experts_touched, prefill_token_s
from gspo_dist.planner.hardware import Gpu
from gspo_dist.planner.host import parked_learner
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.memory import checkpoint_bytes, engine_weights
from gspo_dist.planner.training import optimizer_s, pass_s

__all__ = [
    "ASSUMPTIONS",
    "Assumptions",
    "GpuSpeed",
    "StepTime",
    "collect_s",
    "decode_step_s",
    "experts_touched",
    "prefill_token_s",
    "step_time",
    "sync_s",
]


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of one synchronous step."""

    collect_s: float
    """Sampling the completions."""
    logprobs_s: float
    """Old log-probs and those of the reference."""
    train_s: float
    """Forward and backward passes of all mini-batches, with their optimiser steps."""
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
    optimizer_s: float = field(default=0.0, kw_only=True)
    """The optimiser steps' share of `train_s`."""
    switch_s: float = field(default=0.0, kw_only=True)
    """Colocated engines and learner handing the GPUs to each other."""
    checkpoint_s: float = field(default=0.0, kw_only=True)
    """Writing checkpoints, averaged over the steps."""
    evaluation_s: float = field(default=0.0, kw_only=True)
    """Held-out evaluation, averaged over the steps."""
    driver_s: float = field(default=0.0, kw_only=True)
    """The driver's own work."""

    @property
    def side_s(self) -> float:
        """Forward passes beside the update and the log-probs."""
        return self.guard_s + self.flips_s + self.probe_s

    @property
    def learn_s(self) -> float:
        """What the learner does between two publications, in which separate engines can go on."""
        return self.logprobs_s + self.train_s + self.side_s + self.switch_s + self.driver_s

    @property
    def pause_s(self) -> float:
        """What nobody else works beside: publication, checkpoint and evaluation."""
        return self.sync_s + self.checkpoint_s + self.evaluation_s

    @property
    def total_s(self) -> float:
        return self.collect_s + self.learn_s + self.pause_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.total_s / self.gpus


def sync_s(model: ModelShape, learner: LearnerLayout, gpu: Gpu, assume: Assumptions, cards: int = 1) -> float:
    """Seconds of a publication over `cards` network cards at once."""
    tensors = model.layers * 8 + 3 + model.moe_layers * (1 + 3 * model.num_experts)
    copied = learner.width * model.total / (cards * gpu.network_gb_s * 1e9 * assume.sync_share)
    return assume.sync_tensor_s * tensors + copied


def step_time(
    model: ModelShape,
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    gpu: Gpu,
    concurrency: int,
    assume: Assumptions = ASSUMPTIONS,
) -> StepTime:
    """Estimates one synchronous step (collect, log-probs, mini-batches, weight sync, one after the other).

    concurrency: sequences that an engine decodes at once on average.
    """
    run = work.run
    per_node = run.plan.gpus_per_node or gpu.gpus_per_node

    def forward_s(sequences: float) -> float:
        return pass_s(model, learner, work, gpu, sequences, assume)

    def of_tokens_s(tokens: float) -> float:
        """A forward pass alone over so many tokens, in sequences of the mean length."""
        return forward_s(tokens / work.mean_length)

    passes = run.mini_batches
    update = passes * pass_s(model, learner, work, gpu, work.rollouts / passes, assume, update=True)
    if work.scored and learner.pipeline > 1:  # a pipeline measures the routers' shift in a pass of its own
        update += passes * forward_s(work.rollouts / passes)
    steps = passes * optimizer_s(model, learner, gpu, per_node, assume)
    switch = 0.0
    if engine.colocated:
        parked = sum(item.bytes for item in parked_learner(model, learner))
        moved = engine_weights(model, engine) + parked
        switch = 2 * moved / (gpu.pcie_gb_s * 1e9 * assume.pcie_share)
    checkpoint = 0.0
    if run.checkpoint.every:
        hosts = -(-learner.world_size // per_node)
        checkpoint = (
            checkpoint_bytes(model, learner) / (hosts * run.plan.storage_gb_s * 1e9) / run.checkpoint.every
        )
    evaluation = 0.0
    if run.evaluation.every and engine.engines:
        held_out, samples = run.evaluation.prompts, run.evaluation.samples
        once = collect_s(model, engine, work, gpu, concurrency, assume, prompts=held_out, samples=samples)
        evaluation = once / run.evaluation.every
    separate = engine.engines * engine.tensor_parallel
    return StepTime(
        collect_s=collect_s(model, engine, work, gpu, concurrency, assume) if engine.engines else 0.0,
        # Mini-batch after mini-batch: a pipeline fills up for each.
        logprobs_s=work.forward_passes * passes * forward_s(work.rollouts / passes),
        train_s=update + steps,
        sync_s=sync_s(model, learner, gpu, assume, per_node if engine.colocated else 1),
        tokens=work.tokens,
        gpus=learner.world_size if engine.colocated else learner.world_size + separate,
        guard_s=of_tokens_s(work.guard_tokens),
        flips_s=of_tokens_s(work.flip_tokens) if model.moe_layers else 0.0,
        probe_s=of_tokens_s(work.probe_tokens),
        optimizer_s=steps,
        switch_s=switch,
        checkpoint_s=checkpoint,
        evaluation_s=evaluation,
        driver_s=assume.driver_s + assume.rollout_s * work.rollouts,
    )
