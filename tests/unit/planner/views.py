"""Short ways to write the three views that the planner takes of a run's configuration."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from gspo_dist.config import (
    ClusterConfig,
    DeepSpeedConfig,
    FlipsConfig,
    LearnerConfig,
    MegatronConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
)
from gspo_dist.models.shape import ModelShape, find_model
from gspo_dist.planner.hardware import Gpu, find_gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.plan import Plan, plan

SECTIONS = {"megatron": MegatronConfig, "deepspeed": DeepSpeedConfig}
OWN = {field.name for field in fields(LearnerConfig)}


def learner_of(backend: str = "megatron", *, keep_reference: bool = False, **knobs) -> LearnerLayout:
    """A learner; a knob that `LearnerConfig` does not have is one of the backend's own section."""
    own = {"token_budget": 8192, **{k: v for k, v in knobs.items() if k in OWN}}
    section = {k: v for k, v in knobs.items() if k not in OWN}
    nested = {backend: SECTIONS[backend](**section)} if backend in SECTIONS else {}
    return LearnerLayout(LearnerConfig(backend=backend, **own, **nested), keep_reference)


def engine_of(
    engines: int = 1, tensor_parallel: int = 1, *, colocated: bool = False, **knobs
) -> EngineLayout:
    return EngineLayout(RolloutConfig(engines=engines, tensor_parallel=tensor_parallel, **knobs), colocated)


def work_of(
    prompts: int = 64,
    group: int = 16,
    *,
    prompt: int = 1024,
    completion: int = 8192,
    mini_batches: int = 1,
    mean_fill: float = 0.5,
    flips: int = 0,
    bucket_mib: int = 256,
    **objective,
) -> Workload:
    """One step: prompts and their groups, the longest prompt and completion in tokens."""
    rollout = RolloutConfig(
        prompts_per_step=prompts, group_size=group, max_prompt_tokens=prompt, max_completion_tokens=completion
    )
    rollout = replace(rollout, weight_sync=replace(rollout.weight_sync, bucket_mib=bucket_mib))
    run = RunConfig(
        mini_batches=mini_batches,
        learner=LearnerConfig(token_budget=prompt + completion),
        rollout=rollout,
        objective=ObjectiveConfig(**objective),
        flips=FlipsConfig(every=flips),
    )
    return Workload(run, mean_fill)


def run_of(learner: LearnerLayout, engine: EngineLayout, work: Workload) -> RunConfig:
    """The configuration that the three views are views of: the engines' knobs with the lengths of `work`."""
    sampled = work.run.rollout
    rollout = replace(
        engine.config,
        prompts_per_step=sampled.prompts_per_step,
        group_size=sampled.group_size,
        max_prompt_tokens=sampled.max_prompt_tokens,
        max_completion_tokens=sampled.max_completion_tokens,
    )
    return replace(
        work.run,
        learner=learner.config,
        rollout=rollout,
        cluster=ClusterConfig(colocated=engine.colocated),
    )


def plan_of(
    learner: LearnerLayout,
    engine: EngineLayout,
    work: Workload,
    model: ModelShape,
    gpu: Gpu | None,
    *args,
    **rest,
) -> Plan:
    return plan(run_of(learner, engine, work), model, gpu, *args, **rest)


def change(view: LearnerLayout | EngineLayout, **knobs) -> Any:
    """The view of the same configuration with other knobs; ValueError where it refuses them."""
    if isinstance(view, EngineLayout):
        outer = {"colocated": knobs.pop("colocated")} if "colocated" in knobs else {}
        return replace(view, config=replace(view.config, **knobs), **outer)
    section = {k: v for k, v in knobs.items() if k not in OWN}
    own = {k: v for k, v in knobs.items() if k in OWN}
    if section:
        own[view.backend] = replace(getattr(view.config, view.backend), **section)
    return replace(view, config=replace(view.config, **own))


QWEN = find_model("Qwen3-30B-A3B")
H100 = find_gpu("H100")
WORK = work_of(prompts=256, group=16, prompt=2048, completion=8192)
# Two layers, 0.6 M parameters: small enough for a CPU host, and for sums by hand.
TINY = replace(
    QWEN,
    vocab=512,
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    num_experts=8,
    top_k=2,
    expert_ffn=64,
    expert_layers=(True,) * 2,
)
LEARNER = learner_of(
    world_size=16, token_budget=20480, tensor_parallel=2, expert_parallel=8, recompute="full"
)
ENGINE = engine_of(engines=8, tensor_parallel=2)
BOTH_PASSES = {"old_logprobs": "recompute", "kl_coef": 0.1}
