"""Checks of a parallel layout and of the megatron knobs, before anything starts.

A layout is checked against the model and the number of ranks, knobs against each other and the machine. All
of it is arithmetic without torch, so that `gspo plan` makes the same checks before anything starts.

Ranks are ordered as megatron-core orders them, fastest first: tensor, context, data, pipeline. The experts
have a factorisation of their own of the same ranks: expert_tensor x expert x expert_data x pipeline.

Example: 16 ranks with tensor 2, context 2, pipeline 2 and expert 4 have 16 / 8 = 2 data-parallel replicas,
and 16 / (4 x 2) = 2 replicas of each expert.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from gspo_dist.checks import divisors
from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron.passed import UNEVEN, check_passed
from gspo_dist.models.shape import ModelShape

TRANSFORMER_ENGINE = ">=2.9,<2.12"
"""What megatron-core 0.16.1 asks for (its extra `dev`)."""
TRANSFORMER_ENGINE_COMMAND = (
    f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]{TRANSFORMER_ENGINE}'"
)
FLASH_ATTN = "2.8.3"
"""The newest that Transformer Engine 2.11 takes. It passes over 2.8.3.post1 and post2, and uses no other
attention over packed sequences before Hopper."""


@dataclass(frozen=True)
class Layout:
    """A checked layout: every size divides what it must. Made by `check_layout`."""

    world_size: int
    """Ranks in all."""
    tensor: int
    """Ranks that share each matrix of attention and of dense feed-forward layers."""
    pipeline: int
    """Stages that the layers are dealt to."""
    virtual_stages: int
    """Model chunks per pipeline rank."""
    expert: int
    """Ranks that the experts are dealt to."""
    expert_tensor: int
    """Ranks that share each matrix of an expert."""
    context: int
    """Ranks that share each sequence."""
    sequence_parallel: bool
    """Whether tensor ranks also share the rows between their matrices."""

    @property
    def data(self) -> int:
        """Data-parallel replicas of the attention and embedding weights."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def token_multiple(self) -> int:
        """A context rank's tokens are padded to this, so that tensor ranks get equal rows."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def sequence_multiple(self) -> int:
        """A sequence is padded to this: each context rank takes an early and a late chunk of one length."""
        return 2 * self.context if self.context > 1 else 1


def check_layout(config: MegatronConfig, model: ModelShape, world_size: int) -> Layout:
    """The layout, or ValueError: which number does not divide which, and the divisors that would."""
    config.check_ranks(world_size)
    # null means: wherever it does something.
    sequence = config.tensor_parallel > 1 and config.sequence_parallel is not False
    tp, pp = config.tensor_parallel, config.pipeline_parallel
    _divides("tensor_parallel", tp, "num_attention_heads", model.heads)
    if model.kv_heads % tp and tp % model.kv_heads:
        raise ValueError(
            "learner.megatron.tensor_parallel must divide num_key_value_heads or be a multiple of it: got "
            f"{tp} and {model.kv_heads}; try {divisors(model.kv_heads)}"
        )
    _divides("tensor_parallel", tp, "vocab_size", model.vocab)
    _divides("tensor_parallel", tp, "intermediate_size", model.ffn)
    if sequence:
        _divides("tensor_parallel", tp, "hidden_size", model.hidden)
    stages = pp * config.virtual_stages
    if not any(key in config.transformer for key in UNEVEN):
        _divides("pipeline_parallel x virtual_stages", stages, "num_hidden_layers", model.layers)
    _check_experts(config, model, sequence)
    return Layout(
        world_size,
        tp,
        pp,
        config.virtual_stages,
        config.expert_parallel,
        config.expert_tensor_parallel,
        config.context_parallel,
        sequence,
    )


def _check_experts(config: MegatronConfig, model: ModelShape, sequence: bool) -> None:
    ep, etp = config.expert_parallel, config.expert_tensor_parallel
    if not model.moe_layers:
        if ep > 1 or etp > 1:
            raise ValueError(
                "learner.megatron.expert_parallel and expert_tensor_parallel need a mixture-of-experts "
                f"model: got {ep} and {etp} for {model.architecture} without experts; set both to 1"
            )
        return
    _divides("expert_parallel", ep, "num_experts", model.num_experts)
    _divides("expert_tensor_parallel", etp, "moe_intermediate_size", model.expert_ffn)
    _divides("tensor_parallel", config.tensor_parallel, "shared_expert_intermediate_size", model.shared_ffn)
    if config.tensor_parallel > 1 and not sequence:
        raise ValueError(
            "learner.megatron.sequence_parallel must be on for a mixture of experts with tensor_parallel > "
            f"1: got tensor_parallel {config.tensor_parallel} and sequence_parallel false; leave it null"
        )
    if config.expert_bias and config.aux_loss_coef:
        raise ValueError(
            "learner.megatron.expert_bias and aux_loss_coef are two ways to balance the experts: got both "
            f"(aux_loss_coef {config.aux_loss_coef}); keep one"
        )
    if config.token_dispatcher == "allgather" and ep * etp > config.tensor_parallel * config.context_parallel:
        raise ValueError(
            "learner.megatron.token_dispatcher allgather cannot serve experts shared by data replicas, "
            f"whose micro-batches differ in length: got expert_parallel {ep} x expert_tensor_parallel {etp} "
            f"above tensor_parallel {config.tensor_parallel} x context_parallel {config.context_parallel}; "
            "use alltoall"
        )
    if config.token_dispatcher == "flex" and ep * etp == 1:
        raise ValueError(
            "learner.megatron.token_dispatcher flex (DeepEP) sends tokens between expert ranks: got "
            "expert_parallel 1 and expert_tensor_parallel 1; use alltoall"
        )
    if config.token_dispatcher == "allgather" and config.pipeline_parallel > 1:
        raise ValueError(
            "learner.megatron.token_dispatcher allgather cannot serve micro-batches of varying length under "
            "pipeline_parallel > 1: use alltoall"
        )


def transformer_engine_version() -> str | None:
    """The installed Transformer Engine, or None. It is looked for and not imported."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None


def takes_transformer_engine(version: str) -> bool:
    """Whether megatron-core takes this version: 2.9 to below 2.12. Example: 2.11.0+c188b53 yes, 2.20.2 no."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (2, 9) <= (major, minor) < (2, 12)


def check_knobs(config: LearnerConfig, *, gpu: bool) -> None:
    """Refuses knobs that contradict each other or the machine, with ValueError."""
    megatron = config.megatron
    if gpu and config.precision == "fp32":
        raise ValueError(
            "learner=megatron needs learner.precision=bf16 on GPUs: got fp32, for which Transformer Engine "
            "(2.9, 2.10) has no attention over packed sequences; use bf16, or learner=deepspeed"
        )
    if megatron.token_dispatcher == "flex" and not gpu:
        raise ValueError("learner.megatron.token_dispatcher flex (DeepEP) needs a GPU: use alltoall")
    for knob in ("precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(megatron, knob) and not gpu:
            raise ValueError(f"learner.megatron.{knob} needs a GPU: this learner runs on a CPU; turn it off")
    for knob in ("precision_aware_optimizer", "optimizer_cpu_offload", "overlap_param_gather"):
        if getattr(megatron, knob) and not megatron.distributed_optimizer:
            raise ValueError(
                f"learner.megatron.{knob} needs distributed_optimizer: got false; set "
                "distributed_optimizer=true"
            )
    if megatron.overlap_param_gather and not megatron.overlap_grad_reduce:
        raise ValueError(
            "learner.megatron.overlap_param_gather needs overlap_grad_reduce: got false; set it too"
        )
    if config.deterministic:
        _check_deterministic(megatron)
    check_passed(megatron)


def _check_deterministic(config: MegatronConfig) -> None:
    """Refuses kernels that `learner.deterministic` cannot repeat."""
    if config.token_dispatcher == "flex":
        raise ValueError(
            "learner.megatron.token_dispatcher flex cannot be had with learner.deterministic: DeepEP "
            "promises no order of the tokens that reach an expert, whose sum is its gradient; use alltoall"
        )
    if config.transformer.get("moe_permute_fusion"):
        raise ValueError(
            "learner.megatron.transformer.moe_permute_fusion=true cannot be had with learner.deterministic: "
            "megatron-core adds up the experts' outputs in one order only without it; unset it"
        )


def check_transformer_engine() -> None:
    """Raises ValueError where Transformer Engine, which the learner needs on GPUs, is missing or of a version
    that megatron-core does not take.
    """
    version = transformer_engine_version()
    if version is not None and takes_transformer_engine(version):
        return
    found = "it is not installed, and no lock holds it (it is compiled against torch and CUDA)"
    if version is not None:
        found = f"got {version}, and megatron-core 0.16.1 takes {TRANSFORMER_ENGINE}"
    raise ValueError(
        f"learner=megatron needs Transformer Engine on GPUs: {found}; build docker/Dockerfile.gpu with "
        f"--build-arg TRANSFORMER_ENGINE=1, or `{TRANSFORMER_ENGINE_COMMAND}`, or use learner=deepspeed"
    )


def _divides(knob: str, value: int, what: str, total: int) -> None:
    if total % value:
        raise ValueError(
            f"learner.megatron.{knob} must divide {what}: got {value} and {total}; try {divisors(total)}"
        )
