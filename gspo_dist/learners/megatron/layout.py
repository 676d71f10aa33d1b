"""Checks a parallel layout against the model and the number of ranks, and knobs against each other and the machine,
before anything starts. Pure arithmetic, so that `gspo plan` makes the same checks.

Ranks are ordered as megatron-core orders them, fastest first: tensor, context, (expert,) data, pipeline. The experts
have their own factorisation of the same ranks: expert_tensor x expert x expert_data x pipeline.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """A checked layout: every size divides what it must. Made by `check_layout`."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_stages: int
    expert: int
    expert_tensor: int
    context: int
    sequence_parallel: bool

    @property
    def data(self) -> int:
        """Data-parallel replicas of the attention and embedding weights."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def token_multiple(self) -> int:
        """A context rank's tokens are padded to this: each cut gives tensor ranks equal rows (sequence parallel)."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def sequence_multiple(self) -> int:
        """A sequence is padded to this, so that context ranks take two equal chunks each (early and late)."""
        return 2 * self.context if self.context > 1 else 1


def check_layout(config: MegatronConfig, model: Architecture, world_size: int) -> Layout:
    """The layout, or ValueError: which number does not divide which, and the divisors that would."""
    sequence = config.sequence_parallel
    sequence = config.tensor_parallel > 1 if sequence is None else sequence and config.tensor_parallel > 1
    tp, pp, cp = config.tensor_parallel, config.pipeline_parallel, config.context_parallel
    _divides("tensor_parallel", tp, "num_attention_heads", model.num_heads)
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        raise ValueError(
            "learner.megatron.tensor_parallel must divide num_key_value_heads or be a multiple of it: got "
            f"{tp} and {model.num_kv_heads}; try {_divisors(model.num_kv_heads)}"
        )
    _divides("tensor_parallel", tp, "vocab_size", model.vocab_size)
    _divides("tensor_parallel", tp, "intermediate_size", model.ffn_size)
    if sequence:
        _divides("tensor_parallel", tp, "hidden_size", model.hidden_size)
    stages = pp * config.virtual_stages
    _divides("pipeline_parallel x virtual_stages", stages, "num_hidden_layers", model.num_layers)
    if tp * pp * cp == 0 or world_size % (tp * pp * cp):
        _refuse(
            "tensor_parallel x pipeline_parallel x context_parallel", tp * pp * cp, "world_size", world_size
        )
    _check_experts(config, model, world_size, sequence)
    return Layout(
        world_size,
        tp,
        pp,
        config.virtual_stages,
        config.expert_parallel,
        config.expert_tensor_parallel,
        cp,
        sequence,
    )


def _check_experts(config: MegatronConfig, model: Architecture, world_size: int, sequence: bool) -> None:
    ep, etp = config.expert_parallel, config.expert_tensor_parallel
    if not model.num_moe_layers:
        if ep > 1 or etp > 1:
            raise ValueError(
                "learner.megatron.expert_parallel and expert_tensor_parallel need a mixture-of-experts model: got "
                f"{ep} and {etp} for {model.name} without experts; set both to 1"
            )
        return
    _divides("expert_parallel", ep, "num_experts", model.num_experts)
    _divides("expert_tensor_parallel", etp, "moe_intermediate_size", model.expert_ffn_size)
    shared = ep * etp * config.pipeline_parallel
    if world_size % shared:
        _refuse(
            "expert_tensor_parallel x expert_parallel x pipeline_parallel", shared, "world_size", world_size
        )
    if config.tensor_parallel > 1 and not sequence:
        raise ValueError(
            "learner.megatron.sequence_parallel must be on for a mixture of experts with tensor_parallel > 1: got "
            f"tensor_parallel {config.tensor_parallel} and sequence_parallel false; leave it null"
        )
    if config.expert_bias and config.aux_loss_coef:
        raise ValueError(
            "learner.megatron.expert_bias and aux_loss_coef are two ways to balance the experts: got both "
            f"(aux_loss_coef {config.aux_loss_coef}); keep one"
        )
    if config.token_dispatcher == "allgather" and ep * etp > config.tensor_parallel * config.context_parallel:
        raise ValueError(
            "learner.megatron.token_dispatcher allgather cannot serve experts shared by data replicas, whose micro-batches "
            f"differ in length: got expert_parallel {ep} x expert_tensor_parallel {etp} above tensor_parallel "
            f"{config.tensor_parallel} x context_parallel {config.context_parallel}; use alltoall"
        )
    if config.token_dispatcher == "flex" and ep * etp == 1:
        raise ValueError(
            "learner.megatron.token_dispatcher flex (DeepEP) sends tokens between expert ranks: got expert_parallel 1 and "
            "expert_tensor_parallel 1; use alltoall"
        )
    if config.token_dispatcher == "allgather" and config.pipeline_parallel > 1:
        raise ValueError(
            "learner.megatron.token_dispatcher allgather cannot serve micro-batches of varying length under "
            "pipeline_parallel > 1: use alltoall"
        )


def have_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def check_knobs(config: LearnerConfig, *, gpu: bool) -> None:
    """ValueError for knobs that contradict each other or the machine, before anything starts."""
    megatron = config.megatron
    if gpu and config.precision == "fp32":
        raise ValueError(
            "learner=megatron needs learner.precision=bf16 on GPUs: got fp32, for which Transformer Engine (2.9, 2.10) has "
            "no attention over packed sequences; use bf16, or learner=deepspeed"
        )
    if megatron.token_dispatcher == "flex" and not gpu:
        raise ValueError("learner.megatron.token_dispatcher flex (DeepEP) needs a GPU: use alltoall")
    for knob in ("precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(megatron, knob) and not gpu:
            raise ValueError(f"learner.megatron.{knob} needs a GPU: this learner runs on a CPU; turn it off")
    for knob in ("precision_aware_optimizer", "optimizer_cpu_offload", "overlap_param_gather"):
        if getattr(megatron, knob) and not megatron.distributed_optimizer:
            raise ValueError(
                f"learner.megatron.{knob} needs distributed_optimizer: got false; set distributed_optimizer=true"
            )
    if megatron.overlap_param_gather and not megatron.overlap_grad_reduce:
        raise ValueError(
            "learner.megatron.overlap_param_gather needs overlap_grad_reduce: got false; set it too"
        )


def check_transformer_engine() -> None:
    """Raises ValueError where the learner's GPU form lacks it."""
    if not have_transformer_engine():
        raise ValueError(
            "learner=megatron needs Transformer Engine on GPUs: it is not installed, and no lock holds it (it is compiled "
            "against torch and CUDA); build docker/Dockerfile.gpu with --build-arg TRANSFORMER_ENGINE=1, or `pip install "
            "--no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9,<2.12'`, or use learner=deepspeed"
        )


def _divides(knob: str, value: int, what: str, total: int) -> None:
    if total % value:
        _refuse(knob, value, what, total, "divide")


def _refuse(knob: str, value: int, what: str, total: int, verb: str = "divide") -> None:
    raise ValueError(
        f"learner.megatron.{knob} must {verb} {what}: got {value} and {total}; try {_divisors(total)}"
    )


def _divisors(total: int, most: int = 8) -> str:
    found = [str(d) for d in range(1, total + 1) if total % d == 0]
    return ", ".join(found[:most]) + (", ..." if len(found) > most else "")
