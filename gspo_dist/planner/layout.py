"""What a plan reads of a run's configuration: the learner's ranks, the engines, and the work of one step.

Each record is a view of one `RunConfig`: it stores the configuration itself and gives its knobs names that
hold for every backend. A plan therefore has no defaults and no checks of its own. A layout that breaks a
rule of `config` cannot be built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gspo_dist.checks import divisors
from gspo_dist.config import LearnerConfig, RolloutConfig, RunConfig
from gspo_dist.config.rollout import PROBE_SEQUENCES, PROBE_TOKENS
from gspo_dist.models.shape import ModelShape
from gspo_dist.objectives.legality import spec_of
from gspo_dist.planner.pipeline import Lengths

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per weight of each `precision`."""
MOMENTS = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
"""Bytes of each type that `learner.megatron.optimizer` may name for a moment."""
COUNTED = frozenset(
    {
        "megatron.transformer.num_layers_in_first_pipeline_stage",
        "megatron.transformer.num_layers_in_last_pipeline_stage",
        "megatron.transformer.recompute_modules",
        "megatron.optimizer.optimizer_offload_fraction",
        "megatron.optimizer.exp_avg_dtype",
        "megatron.optimizer.exp_avg_sq_dtype",
        "deepspeed.config.zero_optimization.reduce_bucket_size",
        "deepspeed.config.zero_optimization.offload_optimizer.ratio",
    }
)
"""Keys passed on to a backend's own configuration that a plan counts."""


@dataclass(frozen=True)
class LearnerLayout:
    """The learner's ranks and what each keeps, under the same names for every backend."""

    config: LearnerConfig
    """The knobs, which `gspo_dist.config.learner` explains."""
    keep_reference: bool = False
    """Every rank also keeps a frozen copy of the starting weights (objective.kl_coef above 0)."""

    @property
    def backend(self) -> str:
        return self.config.backend

    @property
    def world_size(self) -> int:
        """Ranks of the learner."""
        return self.config.world_size

    @property
    def width(self) -> int:
        """Bytes per weight."""
        return BYTES[self.config.precision]

    @property
    def half(self) -> bool:
        """Weights are in 16 bits, so that the optimiser keeps float32 master weights beside them."""
        return self.config.precision != "fp32"

    @property
    def token_budget(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.config.token_budget

    @property
    def forward_budget(self) -> int:
        """Tokens of the largest micro-batch of a pass in which nothing is trained."""
        return self.config.forward_budget

    @property
    def tensor(self) -> int:
        """Ranks that share each matrix."""
        return self._knob(megatron="tensor_parallel", otherwise=1)

    @property
    def pipeline(self) -> int:
        """Stages that the layers are cut into."""
        return self._knob(megatron="pipeline_parallel", otherwise=1)

    @property
    def virtual_stages(self) -> int:
        """Model chunks per stage."""
        return self._knob(megatron="virtual_stages", otherwise=1)

    @property
    def context(self) -> int:
        """Ranks that share each sequence."""
        return self._knob(megatron="context_parallel", otherwise=1)

    @property
    def expert(self) -> int:
        """Ranks that share the experts of a layer, whole experts each."""
        return self._knob(megatron="expert_parallel", deepspeed="expert_parallel", otherwise=1)

    @property
    def expert_tensor(self) -> int:
        """Ranks that share each expert's matrices."""
        return self._knob(megatron="expert_tensor_parallel", otherwise=1)

    @property
    def grouped(self) -> bool:
        """A layer's local experts are computed by one kernel, not one after the other."""
        return self._knob(megatron="grouped_gemm", otherwise=False)

    @property
    def recompute(self) -> str:
        """none | selective | full: activations that the backward pass computes again."""
        full = "full" if self.config.activation_checkpointing else "none"
        return self._knob(megatron="recompute", otherwise=full)

    @property
    def recompute_modules(self) -> frozenset[str]:
        """What selective recomputation computes again, by megatron-core's names."""
        return frozenset(self.config.megatron.transformer.get("recompute_modules", ("layernorm", "moe_act")))

    @property
    def end_stages(self) -> tuple[int | None, int | None]:
        """Layers of the first and of the last pipeline stage, where the run names them."""
        named = self.config.megatron.transformer if self.pipeline > 1 else {}
        first, last = (named.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
        return first, last

    def stages(self, layers: int) -> tuple[int, int, int]:
        """Layers of the first pipeline stage, of the largest one in the middle (0: none), and of the last."""
        first, last = self.end_stages
        others = self.pipeline - sum(end is not None for end in (first, last))
        rest = -(-(layers - (first or 0) - (last or 0)) // others) if others else 0
        middle = rest if self.pipeline > 2 else 0
        return rest if first is None else first, middle, rest if last is None else last

    @property
    def recompute_num_layers(self) -> int:
        """Layers per recomputed block."""
        return self._knob(megatron="recompute_num_layers", otherwise=1)

    @property
    def distributed_optimizer(self) -> bool:
        """Megatron shards its optimiser states over the data-parallel ranks."""
        return self._knob(megatron="distributed_optimizer", otherwise=False)

    @property
    def offload_optimizer(self) -> bool:
        """Optimiser states are in host memory."""
        return self._knob(megatron="optimizer_cpu_offload", deepspeed="offload_optimizer", otherwise=False)

    @property
    def offload_fraction(self) -> float:
        """Share of the optimiser states that is in host memory, where some are."""
        if self.backend == "megatron":
            return float(self.config.megatron.optimizer.get("optimizer_offload_fraction", 1.0))
        if self.zero_stage < 3:  # DeepSpeed (0.19.8) reads the ratio at stage 3 alone
            return 1.0
        return float(self._zero_passed.get("offload_optimizer", {}).get("ratio", 1.0))

    @property
    def reduce_bucket(self) -> int | None:
        """Elements of DeepSpeed's reduce bucket where the run names them."""
        named = self._zero_passed.get("reduce_bucket_size")
        return None if named is None else int(named)

    @property
    def moment_bytes(self) -> int:
        """Bytes per parameter of both moments under `low_precision_moments`."""
        named = self.config.megatron.optimizer
        return sum(MOMENTS[named.get(key, "bfloat16")] for key in ("exp_avg_dtype", "exp_avg_sq_dtype"))

    @property
    def not_counted(self) -> list[str]:
        """Keys passed on to the backend's own configuration whose effect a plan does not know."""
        given = {
            "megatron": ("transformer", "ddp", "optimizer"),
            "deepspeed": ("config",),
        }.get(self.backend, ())
        section = getattr(self.config, self.backend, None)
        keys = [key for name in given for key in _leaves(f"{self.backend}.{name}", getattr(section, name))]
        return [f"learner.{key}" for key in keys if key not in COUNTED]

    @property
    def _zero_passed(self) -> Mapping[str, Any]:
        return self.config.deepspeed.config.get("zero_optimization", {})

    @property
    def offload_params(self) -> bool:
        """Weights are in host memory."""
        return self._knob(deepspeed="offload_params", otherwise=False)

    @property
    def low_precision_moments(self) -> bool:
        """The optimiser's two moments are in bf16."""
        return self._knob(megatron="precision_aware_optimizer", otherwise=False)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage. 0 for the other backends."""
        return self._knob(deepspeed="zero_stage", otherwise=0)

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.config.data_parallel

    @property
    def shards(self) -> int:
        """Ranks that share the optimiser states of a non-expert weight."""
        # Context ranks hold the same weights.
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimiser states of an expert weight."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    def changed(self, section: str | None = None, **knobs: Any) -> LearnerLayout | None:
        """The layout with other knobs of `LearnerConfig`, or of its section `megatron` or `deepspeed`.

        None where the configuration refuses them.
        """
        try:
            if section is not None:
                knobs = {section: dataclasses.replace(getattr(self.config, section), **knobs)}
            return dataclasses.replace(self, config=dataclasses.replace(self.config, **knobs))
        except ValueError:
            return None

    def _knob(self, *, otherwise: Any, megatron: str | None = None, deepspeed: str | None = None) -> Any:
        """The value of the backend's own knob, or `otherwise` for a backend that has none."""
        name = {"megatron": megatron, "deepspeed": deepspeed}.get(self.backend)
        return otherwise if name is None else getattr(getattr(self.config, self.backend), name)


def _leaves(where: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Dotted names of everything in nested mappings."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{where}.{key}", value)
        else:
            yield f"{where}.{key}"


@dataclass(frozen=True)
class EngineLayout:
    """The rollout engines."""

    config: RolloutConfig
    """The knobs, which `gspo_dist.config.rollout` explains."""
    colocated: bool = False
    """They share the learner's GPUs and sleep during the update."""

    @property
    def engines(self) -> int:
        """Engine processes with a device of their own. The reference engine has none."""
        return self.config.engines if self.config.engine == "vllm" else 0

    @property
    def tensor_parallel(self) -> int:
        """GPUs per engine."""
        return self.config.tensor_parallel

    @property
    def width(self) -> int:
        """Bytes per weight."""
        return BYTES[self.config.precision]

    @property
    def max_batched_tokens(self) -> int:
        """vLLM's max_num_batched_tokens on a GPU, which a run leaves at its default."""
        return 8192

    def problems(self, model: ModelShape) -> list[str]:
        """Why vLLM would not start an engine of `tensor_parallel` GPUs, in words.

        Heads: vllm/config/model.py and the attention of each model, which copies heads of keys and values
        where there are more GPUs than heads. Feed-forward sizes: the parallel linear layers and the fused
        experts, which assert.
        """
        size = self.tensor_parallel
        sizes = {"num_attention_heads": model.heads}
        if model.moe_layers < model.layers:
            sizes["intermediate_size"] = model.ffn
        if model.moe_layers and not self.config.expert_parallel:
            sizes["moe_intermediate_size"] = model.expert_ffn
        if model.shared_ffn:
            sizes["shared_expert_intermediate_size"] = model.shared_ffn
        broken = [
            f"rollout.tensor_parallel must divide {what}: got {size} and {total}; try {divisors(total)}"
            for what, total in sizes.items()
            if total % size
        ]
        if model.kv_heads % size and size % model.kv_heads:
            broken.append(
                "rollout.tensor_parallel must divide num_key_value_heads or be a multiple of it: got "
                f"{size} and {model.kv_heads}; try {divisors(model.kv_heads)}"
            )
        return broken


@dataclass(frozen=True)
class Workload:
    """The work of one step."""

    run: RunConfig
    """Where its numbers come from."""
    mean_fill: float = 0.5
    """Assumed mean length of prompts and completions, as a share of the longest allowed."""
    measured: Lengths | None = None
    """How long completions are, where more is known than `mean_fill`."""
    mean_prompt_tokens: float | None = None
    """Mean length of a prompt, where more is known than `mean_fill`."""
    unpacked: int | None = None
    """Sequences of a micro-batch in frameworks that do not pack (published runs). None packs."""

    @property
    def rollouts(self) -> int:
        """Rollouts per step."""
        return self.run.rollout.rollouts_per_step

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, prompt and completion."""
        return self.run.rollout.max_model_len

    @functools.cached_property
    def lengths(self) -> Lengths:
        """How long completions are."""
        limit = self.run.rollout.max_completion_tokens
        if self.measured is not None:
            return self.measured
        plan = self.run.plan
        return Lengths(plan.length_mean or self.mean_fill * limit, plan.length_spread, limit)

    @property
    def mean_prompt(self) -> float:
        """Expected tokens of a prompt."""
        known = self.mean_prompt_tokens or self.run.plan.prompt_mean
        if known is not None:
            return known
        rollout = self.run.rollout
        return min(1.0, self.lengths.mean / rollout.max_completion_tokens) * rollout.max_prompt_tokens

    @property
    def mean_completion(self) -> float:
        """Expected tokens of a completion."""
        return self.lengths.mean

    @property
    def mean_length(self) -> float:
        """Expected tokens per sequence."""
        return self.mean_prompt + self.mean_completion

    @property
    def tokens(self) -> float:
        """Expected tokens per step, prompts included."""
        return self.rollouts * self.mean_length

    @property
    def forward_passes(self) -> int:
        """Passes over the whole batch beside the update's: old log-probs, and those of a reference.

        R2 records while it recomputes, so it always makes the pass of the old log-probs.
        """
        objective = self.run.objective
        recomputes = objective.old_logprobs == "recompute" or objective.routing_replay == "r2"
        return int(recomputes) + int(objective.kl_coef > 0)

    @property
    def guard_tokens(self) -> float:
        """Tokens of the guard's subset per step. 0 where it measures none."""
        objective = self.run.objective
        guard = objective.guard
        measures = guard.estimator == "subset" and guard.action in ("recentre", "recompute")
        if objective.old_logprobs == "recompute" or not measures:
            return 0.0
        return guard.subset_fraction * self.tokens

    @property
    def flip_tokens(self) -> float:
        """Tokens of the flip sample's passes per step of an MoE model, averaged over the steps: one pass
        before the update and one after each mini-batch of a measured step.
        """
        flips = self.run.flips
        passes = 1 + self.run.mini_batches
        return passes * flips.sequences * self.mean_length / flips.every if flips.every else 0.0

    @property
    def probe_tokens(self) -> float:
        """Tokens that the learner computes per step for the weight sync's probe, averaged over the steps."""
        rollout = self.run.rollout
        every = rollout.weight_sync.probe_every
        tokens = PROBE_SEQUENCES * (self.mean_prompt + min(PROBE_TOKENS, self.mean_completion))
        return tokens / every if every else 0.0

    @property
    def trace_sets(self) -> int:
        """Routing traces of a whole batch that the host holds at once: the engines' and R2's own.

        The engines return theirs for R3, and for the live flip metric on the steps that it measures.
        """
        replay = self.run.objective.routing_replay
        return int(replay == "r3" or self.run.flips.every > 0) + int(replay == "r2")

    @property
    def scored(self) -> bool:
        """The objective weighs tokens by how far routers moved, so their scores are kept (rspo)."""
        return "router_shift" in spec_of(self.run.objective.name).reads

    @property
    def asks_again(self) -> bool:
        """The objective asks for a mini-batch's log-probs right before its update (m2po)."""
        return "second_moment_cut" in spec_of(self.run.objective.name).reads

    @property
    def bucket_bytes(self) -> int:
        """Bytes per bucket of the weight sync."""
        return self.run.rollout.weight_sync.bucket_bytes


def read_run(run: RunConfig) -> tuple[LearnerLayout, EngineLayout, Workload]:
    """The three views of a run's configuration."""
    learner = LearnerLayout(run.learner, keep_reference=run.objective.kl_coef > 0)
    return learner, EngineLayout(run.rollout, run.cluster.colocated), Workload(run)
