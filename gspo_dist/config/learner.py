"""The learner: its size, its optimiser, and the knobs of each backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import above, at_least, choose, divisors


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the second mean. Far above the gradients it keeps AdamW from normalising them."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step takes lr x weight_decay of every weight off it."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up from 0."""
    schedule: str = "constant"
    """constant | linear | cosine: the way after the warm-up. The last two end at `min_lr_ratio` x lr."""
    min_lr_ratio: float = 0.0
    """Share of the peak that is left at the last step (linear, cosine)."""
    grad_clip: float = 1.0
    """Largest global gradient norm (L2). 0 turns clipping off."""

    def __post_init__(self) -> None:
        above("learner.optimizer.lr", self.lr, 0.0)
        above("learner.optimizer.eps", self.eps, 0.0)
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"learner.optimizer.min_lr_ratio must be in [0, 1]: got {self.min_lr_ratio}")
        at_least("learner.optimizer.warmup_steps", self.warmup_steps, 0)
        at_least("learner.optimizer.grad_clip", self.grad_clip, 0.0)
        at_least("learner.optimizer.weight_decay", self.weight_decay, 0.0)
        choose("learner.optimizer.schedule", self.schedule, ("constant", "linear", "cosine"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"learner.optimizer.betas must be two numbers in [0, 1): got {list(self.betas)}")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed's own knobs."""

    zero_stage: int = 2
    """ZeRO stage, 0 to 3: 1 shards optimiser states, 2 also gradients, 3 also parameters."""
    expert_parallel: int = 1
    """AutoEP degree: each rank keeps 1 / expert_parallel of every MoE layer's experts. 1 turns AutoEP off."""
    grouped_mm: bool | None = None
    """AutoEP multiplies a rank's experts in one grouped GEMM. null: wherever it can, on GPUs with bf16
    weights (compute capability 8.0 or later). false: one after the other."""
    offload_optimizer: bool = False
    """Keep optimiser states in host memory (GPU hosts, ZeRO 1 to 3)."""
    offload_params: bool = False
    """Keep parameters in host memory (GPU hosts, ZeRO 3)."""
    config: dict[str, Any] = field(default_factory=dict)
    """More keys of DeepSpeed's own configuration, merged into it:
    `+learner.deepspeed.config.zero_optimization.reduce_bucket_size=100000000`. Names are checked before a run
    starts. Keys that gspo_dist sets itself are refused, with the knob to use instead."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"learner.deepspeed.zero_stage must be 0, 1, 2 or 3: got {self.zero_stage}")
        at_least("learner.deepspeed.expert_parallel", self.expert_parallel, 1)
        if self.offload_params and self.zero_stage != 3:
            raise ValueError(
                "learner.deepspeed.offload_params needs zero_stage 3: "
                f"got {self.zero_stage}; set zero_stage=3"
            )


@dataclass(frozen=True)
class MegatronConfig:
    """Megatron-core's layout and speed knobs."""

    tensor_parallel: int = 1
    """Ranks that share each attention layer and the vocabulary."""
    pipeline_parallel: int = 1
    """Stages that the layers are cut into."""
    virtual_stages: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    expert_parallel: int = 1
    """Ranks that share the experts of each MoE layer."""
    expert_tensor_parallel: int = 1
    """Ranks that share each single expert."""
    context_parallel: int = 1
    """Ranks that share each sequence."""
    sequence_parallel: bool | None = None
    """Null: on when tensor_parallel > 1 (megatron-core requires it for MoE)."""
    token_dispatcher: str = "alltoall"
    """alltoall | allgather | flex (DeepEP, GPU only): how tokens reach their experts."""
    grouped_gemm: bool = True
    """Transformer Engine's grouped GEMM for the experts (GPU only, plain GEMMs on a CPU)."""
    distributed_optimizer: bool = True
    """Shard fp32 master weights and moments over data-parallel ranks."""
    optimizer_cpu_offload: bool = False
    """Keep optimiser states in host memory."""
    precision_aware_optimizer: bool = False
    """Moments in lower precision (GPU with Transformer Engine)."""
    recompute: str = "none"
    """none | selective | full: activation recomputation."""
    recompute_num_layers: int = 1
    """Layers that one checkpointed block holds when recompute is full."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs (needs overlap_grad_reduce)."""
    router_dtype: str = "fp32"
    """fp32 | fp64 | model: precision of the router's product and softmax."""
    aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss. 0 (off) is the field's habit in RL."""
    expert_bias: bool = False
    """Auxiliary-loss-free balancing by a bias of the router. Qwen3-MoE's HF format has no place for the bias.
    The engines therefore sample without it, and the mismatch metrics show what that costs. Use it to
    pre-train or to study, not for RL as such."""
    async_save: bool = True
    """Write checkpoints in the background."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """More fields of megatron-core's TransformerConfig:
    `+learner.megatron.transformer.recompute_modules=[moe,layernorm]`. Names and types are checked before a
    run starts. Fields that gspo_dist sets itself are refused, with the knob to use instead."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """More fields of its DistributedDataParallelConfig, checked in the same way: bucket_size and others."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """More fields of its OptimizerConfig, checked in the same way: optimizer_offload_fraction and others."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_parallel",
            "pipeline_parallel",
            "virtual_stages",
            "expert_parallel",
            "expert_tensor_parallel",
            "context_parallel",
            "recompute_num_layers",
        ):
            at_least(f"learner.megatron.{name}", getattr(self, name), 1)
        choose("learner.megatron.token_dispatcher", self.token_dispatcher, ("alltoall", "allgather", "flex"))
        choose("learner.megatron.recompute", self.recompute, ("none", "selective", "full"))
        choose("learner.megatron.router_dtype", self.router_dtype, ("fp32", "fp64", "model"))
        if self.virtual_stages > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                "learner.megatron.virtual_stages needs pipeline_parallel > 1: "
                f"got virtual_stages {self.virtual_stages}; set pipeline_parallel or virtual_stages=1"
            )

    def check_ranks(self, world_size: int) -> None:
        """Raises ValueError unless both ways to cut the ranks divide them: with the experts and without."""
        for sizes, shared in (
            ("tensor_parallel x pipeline_parallel x context_parallel", self.model_parallel),
            ("expert_tensor_parallel x expert_parallel x pipeline_parallel", self.expert_model_parallel),
        ):
            if world_size % shared:
                raise ValueError(
                    f"learner.megatron: {sizes} must divide learner.world_size: got {shared} and "
                    f"{world_size}; try {divisors(world_size)}"
                )

    @property
    def model_parallel(self) -> int:
        """Ranks that share one data-parallel replica."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def expert_model_parallel(self) -> int:
        """Ranks that share one copy of the experts."""
        return self.expert_tensor_parallel * self.expert_parallel * self.pipeline_parallel


@dataclass(frozen=True)
class LearnerConfig:
    """The process group that owns the trainable weights."""

    backend: str = "deepspeed"
    """eager (one process, the reference) | deepspeed | megatron."""
    world_size: int = 1
    """Ranks. Each takes one GPU on GPU hosts."""
    precision: str = "bf16"
    """fp32 | bf16 | fp16: of weights and activations. Master weights and log-probs are fp32 in all three."""
    initial_loss_scale: float = 65536.0
    """fp16 alone: what the loss is multiplied by before the backward pass, a power of two. It halves at an
    overflow, whose step is skipped, and doubles after 100 steps without one."""
    fp32_head: bool = True
    """Compute the LM head's product in fp32."""
    consistency: str = "off"
    """off | exact: exact computes the forward with the engine's own operators, so that the engine's log-probs
    are the learner's bit for bit. `gspo legality` lists what it needs."""
    exact_on_gpu: bool = False
    """Allows `consistency=exact` on GPUs. One card was compared so far, an H100, and every token was equal. A
    run stops at the first token that differs."""
    token_budget: int = 16384
    """Most tokens that a micro-batch holds. Sequences are never cut, so it must hold the longest one."""
    forward_token_budget: int | None = None
    """The same for passes in which nothing is trained: recomputed and reference log-probs, the guard's
    subset, the flip sample, probes. They keep no activations, so several times `token_budget` may fit. null:
    as many as `token_budget`."""
    deterministic: bool = False
    """The same mini-batch gives the same gradient bit for bit, on GPUs too: kernels without atomic sums,
    pinned algorithms of cuBLAS, cuDNN and NCCL. Slower. What cannot be repeated is refused.
    `rollout.batch_invariant` is the engines' side."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass (eager, deepspeed). Megatron has a knob of its own."""
    threads: int = 0
    """CPU threads of each rank. 0 shares the cores that this process may use among the ranks, and the
    environment's OMP_NUM_THREADS caps the share."""
    timeout_s: float = 1800.0
    """Longest that any call may take before the rank counts as dead, and any collective of a call that may
    rightly wait for one rank: the start, the first update (kernels compile), saves, publications."""
    collective_timeout_s: float = 600.0
    """Longest that a collective of any other call may take. A rank waits there for the slowest one, so it is
    short of an update by far. The error names the collective, the rank that is missing, and the dumps of
    torch's flight recorder. A longer one than `timeout_s` counts as that."""
    max_skipped_steps: int = 3
    """Optimiser steps in a row that may be skipped for a gradient that is not finite. They change neither
    weights nor optimiser. One more ends the run; 0 ends it at the first."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Knobs of backend deepspeed. Other backends do not read them."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Knobs of backend megatron. Other backends do not read them."""

    def __post_init__(self) -> None:
        choose("learner.backend", self.backend, ("eager", "deepspeed", "megatron"))
        choose("learner.precision", self.precision, ("fp32", "bf16", "fp16"))
        choose("learner.consistency", self.consistency, ("off", "exact"))
        if not (self.initial_loss_scale >= 1 and math.frexp(self.initial_loss_scale)[0] == 0.5):
            raise ValueError(
                "learner.initial_loss_scale must be a power of two of at least 1 (scaling is then exact): "
                f"got {self.initial_loss_scale}; try 65536"
            )
        at_least("learner.world_size", self.world_size, 1)
        at_least("learner.token_budget", self.token_budget, 1)
        at_least("learner.forward_token_budget", self.forward_budget, 1)
        at_least("learner.threads", self.threads, 0)
        at_least("learner.max_skipped_steps", self.max_skipped_steps, 0)
        above("learner.timeout_s", self.timeout_s, 0)
        above("learner.collective_timeout_s", self.collective_timeout_s, 0)
        if self.backend == "eager" and self.world_size != 1:
            raise ValueError(
                "learner.world_size must be 1 for the eager learner: "
                f"got {self.world_size}; use learner=deepspeed"
            )
        if self.backend == "deepspeed":
            expert_parallel = self.deepspeed.expert_parallel
            if self.world_size % expert_parallel:
                raise ValueError(
                    "learner.deepspeed.expert_parallel must divide learner.world_size: "
                    f"got {expert_parallel} and {self.world_size}; try {divisors(self.world_size)}"
                )
        if self.backend == "megatron":
            self.megatron.check_ranks(self.world_size)

    @property
    def forward_budget(self) -> int:
        """Most tokens of a pass in which nothing is trained."""
        return self.token_budget if self.forward_token_budget is None else self.forward_token_budget

    @property
    def saves_asynchronously(self) -> bool:
        """Whether a checkpoint is still being written when `save` returns."""
        return self.backend == "megatron" and self.megatron.async_save

    @property
    def data_parallel(self) -> int:
        """Replicas that see different micro-batches."""
        shared = self.megatron.model_parallel if self.backend == "megatron" else 1
        return self.world_size // shared
