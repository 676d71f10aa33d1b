"""What a plan is about: how the learner and the engines are laid out, and the work of one step. Plain records.

`read_run` takes them from the plain mapping of a run's configuration, so that the planner needs no other module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gspo_dist.models.shape import ModelShape

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class LearnerLayout:
    """The learner's ranks and what each keeps; the knobs of the same names in gspo_dist.config explain them."""

    backend: str = "megatron"
    world_size: int = 1
    precision: str = "bf16"
    token_budget: int = 8192
    recompute: str = "none"
    recompute_num_layers: int = 1
    keep_reference: bool = False
    """A frozen copy of the starting weights (objective.kl_coef above 0)."""
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    distributed_optimizer: bool = True
    offload_optimizer: bool = False
    offload_params: bool = False
    low_precision_moments: bool = False
    zero_stage: int = 2

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.precision]

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def shards(self) -> int:
        """Ranks that share the optimiser states of a non-expert weight (context ranks hold the same weights)."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimiser states of an expert weight."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    def problems(self, model: ModelShape) -> list[str]:
        """Rules that the layout breaks, in words: what must divide what, and what ZeRO 0 cannot do."""
        rules = [
            (
                "tensor x pipeline x context parallel",
                self.tensor * self.pipeline * self.context,
                "world_size",
                self.world_size,
            ),
            (
                "expert x expert-tensor x pipeline parallel",
                self.expert * self.expert_tensor * self.pipeline,
                "world_size",
                self.world_size,
            ),
            ("tensor_parallel", self.tensor, "num_attention_heads", model.heads),
            (
                "pipeline_parallel x virtual_stages",
                self.pipeline * self.virtual_stages,
                "num_hidden_layers",
                model.layers,
            ),
        ]
        if model.num_experts:
            rules.append(("expert_parallel", self.expert, "num_experts", model.num_experts))
            rules.append(
                ("expert_tensor_parallel", self.expert_tensor, "moe_intermediate_size", model.expert_ffn)
            )
        broken = [
            f"{a} must divide {b}: got {x} and {y}; try {_divisors(y)}" for a, x, b, y in rules if y % x
        ]
        if self.expert > 1 and not model.num_experts:
            broken.append(f"expert_parallel needs a mixture of experts: got {self.expert} for {model.name}")
        if self.backend == "deepspeed" and self.zero_stage == 0:
            needy = (("expert_parallel", self.expert > 1), ("offload_optimizer", self.offload_optimizer))
            broken += [
                f"deepspeed.{knob} needs zero_stage 1 to 3: got 0; raise zero_stage"
                for knob, on in needy
                if on
            ]
        return broken


def _divisors(total: int, most: int = 6) -> str:
    return ", ".join([str(d) for d in range(1, total + 1) if total % d == 0][:most])


@dataclass(frozen=True)
class EngineLayout:
    """The rollout engines."""

    engines: int = 1
    tensor_parallel: int = 1
    precision: str = "bf16"
    gpu_memory_utilization: float = 0.85
    kv_cache_gib: float = 1.0
    """KV cache of an engine on a CPU host."""
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    """vLLM's max_num_batched_tokens on a GPU."""
    enforce_eager: bool = False
    colocated: bool = False
    """Share the learner's GPUs and sleep during the update."""
    expert_parallel: bool = False
    """Whole experts on each GPU, not slices of all."""

    @property
    def width(self) -> int:
        return BYTES[self.precision]

    def problems(self, model: ModelShape) -> list[str]:
        """Why vLLM would not start an engine of `tensor_parallel` GPUs, in words.

        Heads: vllm/config/model.py and the attention of each model, which copies heads of keys and values where there
        are more GPUs than heads. Feed-forward sizes: the parallel linear layers and the fused experts, which assert.
        """
        size = self.tensor_parallel
        sizes = {"num_attention_heads": model.heads}
        if model.moe_layers < model.layers:
            sizes["intermediate_size"] = model.ffn
        if model.moe_layers and not self.expert_parallel:
            sizes["moe_intermediate_size"] = model.expert_ffn
        if model.shared_ffn:
            sizes["shared_expert_intermediate_size"] = model.shared_ffn
        broken = [
            f"rollout.tensor_parallel must divide {what}: got {size} and {total}; try {_divisors(total)}"
            for what, total in sizes.items()
            if total % size
        ]
        if model.kv_heads % size and size % model.kv_heads:
            broken.append(
                "rollout.tensor_parallel must divide num_key_value_heads or be a multiple of it: got "
                f"{size} and {model.kv_heads}; try {_divisors(model.kv_heads)}"
            )
        return broken


@dataclass(frozen=True)
class Workload:
    """One step."""

    prompts_per_step: int = 64
    group_size: int = 16
    mini_batches: int = 4
    max_prompt_tokens: int = 1024
    max_completion_tokens: int = 8192
    mean_fill: float = 0.5
    """Assumed mean length of prompts and completions, as a share of the longest allowed."""
    recompute_old_logprobs: bool = False
    keep_reference: bool = False
    routing_replay: str = "none"
    measures_flips: bool = False
    """The live flip metric is on: on the steps that it measures, engines return the routes of every rollout."""
    bucket_mib: int = 256

    @property
    def rollouts(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def trace_sets(self) -> int:
        """Routing traces that the host holds of a whole batch at once: the engines' (R3, flips) and R2's own."""
        return int(self.routing_replay == "r3" or self.measures_flips) + int(self.routing_replay == "r2")

    @property
    def max_length(self) -> int:
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def mean_length(self) -> float:
        return self.mean_fill * self.max_length

    @property
    def tokens(self) -> float:
        """Expected tokens of a step, prompts included."""
        return self.rollouts * self.mean_length


def read_run(run: Mapping[str, Any]) -> tuple[LearnerLayout, EngineLayout, Workload]:
    """The three records of a run, from `gspo_dist.config.mapping.to_mapping(run_config)`."""
    rollout, objective, cluster = run["rollout"], run["objective"], run["cluster"]
    engine = EngineLayout(
        engines=rollout["engines"] if rollout["engine"] == "vllm" else 0,
        tensor_parallel=rollout["tensor_parallel"],
        precision=rollout["precision"],
        gpu_memory_utilization=rollout["gpu_memory_utilization"],
        kv_cache_gib=rollout["kv_cache_gib"],
        max_num_seqs=rollout["max_num_seqs"],
        enforce_eager=rollout["enforce_eager"],
        colocated=cluster["colocated"],
        expert_parallel=rollout["expert_parallel"],
    )
    reference = objective["kl_coef"] > 0
    # R2 records while it recomputes, so it always makes the extra pass.
    recompute = objective["old_logprobs"] == "recompute" or objective["routing_replay"] == "r2"
    work = Workload(
        prompts_per_step=rollout["prompts_per_step"],
        group_size=rollout["group_size"],
        mini_batches=run["mini_batches"],
        max_prompt_tokens=rollout["max_prompt_tokens"],
        max_completion_tokens=rollout["max_completion_tokens"],
        recompute_old_logprobs=recompute,
        keep_reference=reference,
        routing_replay=objective["routing_replay"],
        measures_flips=run["flips"]["every"] > 0,
        bucket_mib=rollout["weight_sync"]["bucket_mib"],
    )
    return _read_learner(run["learner"], reference), engine, work


def _read_learner(learner: Mapping[str, Any], reference: bool) -> LearnerLayout:
    common = {
        "backend": learner["backend"],
        "world_size": learner["world_size"],
        "precision": learner["precision"],
        "token_budget": learner["token_budget"],
        "keep_reference": reference,
    }
    if learner["backend"] != "megatron":
        deepspeed = learner["deepspeed"] if learner["backend"] == "deepspeed" else {}
        return LearnerLayout(
            **common,
            recompute="full" if learner["activation_checkpointing"] else "none",
            zero_stage=deepspeed.get("zero_stage", 0),
            expert=deepspeed.get("expert_parallel", 1),
            offload_optimizer=deepspeed.get("offload_optimizer", False),
            offload_params=deepspeed.get("offload_params", False),
        )
    knobs = learner["megatron"]
    return LearnerLayout(
        **common,
        recompute=knobs["recompute"],
        recompute_num_layers=knobs["recompute_num_layers"],
        tensor=knobs["tensor_parallel"],
        pipeline=knobs["pipeline_parallel"],
        virtual_stages=knobs["virtual_stages"],
        expert=knobs["expert_parallel"],
        expert_tensor=knobs["expert_tensor_parallel"],
        context=knobs["context_parallel"],
        distributed_optimizer=knobs["distributed_optimizer"],
        offload_optimizer=knobs["optimizer_cpu_offload"],
        low_precision_moments=knobs["precision_aware_optimizer"],
    )
