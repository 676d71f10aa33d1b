"""Every knob of a run, documented where it is defined: frozen dataclasses with cross-field checks.

Imports neither torch nor omegaconf, so that `gspo --help`, `gspo plan` and a config test answer at once. The hydra
schema is derived from these classes (cli.py); a run only ever sees a checked, frozen `RunConfig`.
Errors are `ValueError`: the rule, what was got, the way out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import choose
from gspo_dist.objectives import legality, specs


def at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ValueError(f"{name} must be at least {low}: got {value}")


def above(name: str, value: float | None, low: float) -> None:
    if value is not None and not value > low:
        raise ValueError(f"{name} must be above {low}: got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The policy to start from."""

    path: str | None = None
    """Folder of an HF model (config.json, safetensors, tokenizer). Null: make and cache `recipe`."""
    recipe: str = "quickstart"
    """Built-in cold-start model, made on first use: see `gspo make-model --help`."""
    cache_dir: str = "~/.cache/gspo_dist"
    """Where made models are kept."""

    def __post_init__(self) -> None:
        if self.path is None:
            choose("model.recipe", self.recipe, ("quickstart", "peer"))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up from 0."""
    schedule: str = "constant"
    """constant | linear | cosine, after the warm-up, down to `min_lr_ratio` of the peak at the last step."""
    min_lr_ratio: float = 0.0
    grad_clip: float = 1.0
    """Largest global gradient norm (L2); 0 turns clipping off."""

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
    """ZeRO stage 0 to 3."""
    expert_parallel: int = 1
    """AutoEP degree: each rank keeps num_experts / expert_parallel experts of every MoE layer. 1 turns AutoEP off."""
    grouped_mm: bool = False
    """AutoEP's grouped GEMM (GPU, compute capability 8.0 or later)."""
    offload_optimizer: bool = False
    """Keep optimiser states in host memory (GPU hosts; ZeRO 1 to 3)."""
    offload_params: bool = False
    """Keep parameters in host memory (GPU hosts; ZeRO 3)."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"learner.deepspeed.zero_stage must be 0, 1, 2 or 3: got {self.zero_stage}")
        at_least("learner.deepspeed.expert_parallel", self.expert_parallel, 1)
        if self.offload_params and self.zero_stage != 3:
            raise ValueError(
                f"learner.deepspeed.offload_params needs zero_stage 3: got {self.zero_stage}; set zero_stage=3"
            )


@dataclass(frozen=True)
class MegatronConfig:
    """Megatron-core's layout and speed knobs. Defaults suit Qwen3-30B-A3B on 80-GB GPUs once the sizes are set."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_stages: int = 1
    """Model chunks a pipeline rank (interleaved schedule)."""
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool | None = None
    """Null: on when tensor_parallel > 1 (megatron-core requires it for MoE)."""
    token_dispatcher: str = "alltoall"
    """alltoall | allgather | flex (DeepEP, GPU only)."""
    grouped_gemm: bool = True
    """Transformer Engine's grouped GEMM for the experts (GPU only; plain GEMMs on a CPU)."""
    distributed_optimizer: bool = True
    """Shard fp32 master weights and moments over data-parallel ranks."""
    optimizer_cpu_offload: bool = False
    """Keep optimiser states in host memory."""
    precision_aware_optimizer: bool = False
    """Moments in lower precision (GPU with Transformer Engine)."""
    recompute: str = "none"
    """none | selective | full: activation recomputation."""
    recompute_num_layers: int = 1
    """Layers a checkpointed block holds when recompute is full."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    router_dtype: str = "fp32"
    """fp32 | fp64 | model: precision of the router's product and softmax."""
    aux_loss_coef: float = 0.0
    """Load-balancing loss; 0 (off) is the field's habit in RL."""
    expert_bias: bool = False
    """Auxiliary-loss-free balancing by a bias of the router. Qwen3-MoE's HF format has no place for the bias: the engines
    sample without it, and the mismatch metrics show what that costs; use it to pre-train or to study, not for RL as such."""
    async_save: bool = True
    """Write checkpoints in the background."""

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

    @property
    def model_parallel(self) -> int:
        """Ranks that share one data-parallel replica."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel


@dataclass(frozen=True)
class LearnerConfig:
    """The process group that owns the trainable weights."""

    backend: str = "deepspeed"
    """eager (one process, the reference) | deepspeed | megatron."""
    world_size: int = 1
    """Ranks; one GPU each on GPU hosts."""
    precision: str = "bf16"
    """fp32 | bf16: of weights and activations; master weights and log-probs are fp32 in both."""
    fp32_head: bool = True
    """LM head product in fp32."""
    token_budget: int = 16384
    """Most tokens a micro-batch holds; sequences are never cut, so it must hold the longest one."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass (eager, deepspeed; megatron has its own knob)."""
    threads: int = 0
    """CPU threads of each rank; 0 shares the host's cores among the ranks."""
    timeout_s: float = 1800.0
    """Longest any collective or call may take before the rank counts as dead."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    def __post_init__(self) -> None:
        choose("learner.backend", self.backend, ("eager", "deepspeed", "megatron"))
        choose("learner.precision", self.precision, ("fp32", "bf16"))
        at_least("learner.world_size", self.world_size, 1)
        at_least("learner.token_budget", self.token_budget, 1)
        at_least("learner.threads", self.threads, 0)
        above("learner.timeout_s", self.timeout_s, 0)
        if self.backend == "eager" and self.world_size != 1:
            raise ValueError(
                f"learner.world_size must be 1 for the eager learner: got {self.world_size}; use learner=deepspeed"
            )
        if self.backend == "deepspeed":
            ep = self.deepspeed.expert_parallel
            if self.world_size % ep:
                raise ValueError(
                    f"learner.deepspeed.expert_parallel must divide learner.world_size: got {ep} and "
                    f"{self.world_size}; try {_divisors(self.world_size)}"
                )
        if self.backend == "megatron":
            shared = self.megatron.model_parallel
            if self.world_size % shared:
                raise ValueError(
                    "learner.megatron: tensor_parallel x pipeline_parallel x context_parallel must divide "
                    f"learner.world_size: got {shared} and {self.world_size}; try {_divisors(self.world_size)}"
                )

    @property
    def saves_asynchronously(self) -> bool:
        """Whether a checkpoint is still being written when `save` returns."""
        return self.backend == "megatron" and self.megatron.async_save

    @property
    def data_parallel(self) -> int:
        """Replicas that see different micro-batches."""
        return (
            self.world_size // self.megatron.model_parallel if self.backend == "megatron" else self.world_size
        )


@dataclass(frozen=True)
class WeightSyncConfig:
    """How new weights reach the engines, and how each transfer is checked."""

    transport: str = "auto"
    """auto (nccl where learner and engines are on GPUs, else shm) | nccl | shm."""
    bucket_mib: int = 256
    """Tensors travel in buckets of about this size; at most two buckets are in host memory at once."""
    check: bool = True
    """Compare version and checksum of what arrived after every transfer."""
    probe_every: int = 10
    """Every so many syncs also compare engine and learner log-probs on sequences just sampled; 0 = only the first."""
    probe_tolerance: float = 0.02
    """Largest mean |difference| of log-probs (nats) the probe accepts; fp32 agrees to 1e-5, bf16 to about 5e-3."""
    timeout_s: float = 600.0
    """Longest wait on either side."""

    def __post_init__(self) -> None:
        choose("rollout.weight_sync.transport", self.transport, ("auto", "nccl", "shm"))
        at_least("rollout.weight_sync.bucket_mib", self.bucket_mib, 1)
        at_least("rollout.weight_sync.probe_every", self.probe_every, 0)
        above("rollout.weight_sync.probe_tolerance", self.probe_tolerance, 0)
        above("rollout.weight_sync.timeout_s", self.timeout_s, 0)


@dataclass(frozen=True)
class RolloutConfig:
    """The rollout engines and what they sample."""

    engine: str = "vllm"
    """vllm | reference (the HF model in float32 on the CPU, every prefix recomputed: tests and small models)."""
    engines: int = 1
    """Engine processes; the pool balances prompts over them."""
    tensor_parallel: int = 1
    """GPUs an engine."""
    precision: str = "bf16"
    """fp32 | bf16: of the engine's weights and activations."""
    prompts_per_step: int = 64
    group_size: int = 16
    """Completions a prompt (the paper's G)."""
    max_prompt_tokens: int = 1024
    max_completion_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1, engine log-probs are of the truncated distribution, which the learner cannot reproduce: refused."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory an engine may take."""
    kv_cache_gib: float = 1.0
    """KV cache of an engine on a CPU host."""
    max_num_seqs: int = 256
    """Sequences an engine decodes at once."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: quicker start, slower decoding."""
    threads: int = 0
    """CPU threads of each engine; 0 shares the host's cores among the engines."""
    expert_parallel: bool = False
    """Shard an engine's experts over its tensor-parallel GPUs."""
    timeout_s: float = 3600.0
    """Longest one collect may take."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)

    def __post_init__(self) -> None:
        choose("rollout.engine", self.engine, ("vllm", "reference"))
        choose("rollout.precision", self.precision, ("fp32", "bf16"))
        for name in (
            "engines",
            "tensor_parallel",
            "prompts_per_step",
            "group_size",
            "max_prompt_tokens",
            "max_completion_tokens",
            "max_num_seqs",
        ):
            at_least(f"rollout.{name}", getattr(self, name), 1)
        above("rollout.temperature", self.temperature, 0.0)
        if self.top_p != 1.0:
            raise ValueError(
                f"rollout.top_p must be 1 for training: got {self.top_p}; truncated sampling gives log-probs of "
                "another distribution than the learner's (evaluation.top_p may be set freely)"
            )
        above("rollout.kv_cache_gib", self.kv_cache_gib, 0.0)
        above("rollout.timeout_s", self.timeout_s, 0)
        at_least("rollout.threads", self.threads, 0)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"rollout.gpu_memory_utilization must be in (0, 1]: got {self.gpu_memory_utilization}"
            )

    @property
    def max_model_len(self) -> int:
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.group_size


@dataclass(frozen=True)
class GuardConfig:
    """What to do when engine log-probs move the sequence ratio off centre (see objectives/recentre.py)."""

    action: str = "warn"
    """off | warn | recentre | recompute, when the offset passes `threshold`."""
    threshold: float = 1.0
    """Offset of the mean log ratio at the first mini-batch, in clip widths, that triggers the action."""
    estimator: str = "batch"
    """batch (each micro-batch of the first mini-batch its own mean, where micro-batches hold at least 16 sequences,
    else the last step's) | ema (running mean over steps) | subset (exact, on a recomputed random subset)."""
    ema_decay: float = 0.9
    subset_fraction: float = 0.0625
    """Share of sequences recomputed exactly (estimator subset)."""

    def __post_init__(self) -> None:
        choose("objective.guard.action", self.action, ("off", "warn", "recentre", "recompute"))
        choose("objective.guard.estimator", self.estimator, ("batch", "ema", "subset"))
        at_least("objective.guard.threshold", self.threshold, 0.0)
        if not 0 < self.subset_fraction <= 1:
            raise ValueError(f"objective.guard.subset_fraction must be in (0, 1]: got {self.subset_fraction}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"objective.guard.ema_decay must be in [0, 1): got {self.ema_decay}")


@dataclass(frozen=True)
class CorrectionConfig:
    """Importance correction of the mismatch learner against engine (objectives/mismatch.py)."""

    name: str = "none"
    """none | token_truncate | token_mask | sequence_truncate | sequence_mask | geometric_reject | veto | opsm."""
    low: float | None = None
    """Lower bound (masks, geometric_reject, veto); null: the published value (objectives/specs.py, CORRECTIONS)."""
    high: float | None = None
    """Upper bound (truncations, masks, geometric_reject; opsm: its delta); null: the published value."""

    def __post_init__(self) -> None:
        specs.check_correction(self.name, low=self.low, high=self.high)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss, the advantages, and where old log-probs come from."""

    name: str = "gspo"
    """gspo | gspo_token | grpo | dapo | dr_grpo | cispo | gmpo | sapo | minirl | reinforce, or package.module:name."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the objective, e.g. {clip_low: 3e-4, clip_high: 4e-4}; the rest keep the paper's values."""
    aggregation: str | None = None
    """Only for a function of your own (package.module:name), which has no aggregation yet; null elsewhere."""
    allow_wide_clip: bool = False
    """Insist on a clip range of GRPO's size for a sequence-level ratio."""
    advantage: str | None = None
    """group_std | group_mean | leave_one_out | none; null: the objective's own."""
    kl_coef: float = 0.0
    """Weight of the KL to the frozen starting policy; above 0 the learner also keeps that reference."""
    kl_estimator: str = "k3"
    old_logprobs: str = "rollout"
    """rollout (the engine's, nothing is recomputed) | recompute (one more forward pass of the learner)."""
    routing_replay: str = "none"
    """none | r2 (the learner records while it recomputes) | r3 (the engine records while it samples)."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    def __post_init__(self) -> None:
        choose("objective.old_logprobs", self.old_logprobs, ("rollout", "recompute"))
        choose("objective.routing_replay", self.routing_replay, ("none", "r2", "r3"))
        choose("objective.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        at_least("objective.kl_coef", self.kl_coef, 0.0)
        legality.check(
            self.name,
            params=self.params,
            old_logprobs=self.old_logprobs,
            routing_replay=self.routing_replay,
            correction=self.correction.name,
            guard_action=self.guard.action,
            aggregation=self.aggregation,
            advantage=self.advantage,
            allow_wide_clip=self.allow_wide_clip,
        )

    @property
    def advantage_name(self) -> str:
        """The advantage estimator in force (a user's own objective defaults to group_std)."""
        spec = specs.OBJECTIVE_SPECS.get(self.name)
        return self.advantage or (spec.advantage if spec else "group_std")


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out prompts."""

    train: str = "arithmetic"
    """A .jsonl/.parquet file, `reasoning_gym:TASK`, or `arithmetic` (the quickstart's own task)."""
    heldout: str | None = "arithmetic"
    """The same kinds; a file here must not share prompts with `train`. Null: no evaluation."""
    prompt_key: str = "prompt"
    """Field of a record that holds the question: a text, or a list of chat messages."""
    answer_key: str = "answer"
    chat_template: bool = True
    """Apply the tokenizer's chat template to questions given as text, where it has one."""
    system_prompt: str | None = None
    shuffle: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a procedural source (size, number of digits, ...)."""


@dataclass(frozen=True)
class RewardConfig:
    """How a completion is judged."""

    function: str = "exact_match"
    """exact_match | math, or a function of yours: package.module:name, or path/to/file.py:name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""
    workers: int = 1
    """Reward processes."""
    timeout_s: float = 30.0
    """Deadline for one rollout's reward."""
    timeout_reward: float | None = 0.0
    """Reward of a rollout that misses the deadline (counted in reward/timeout_fraction); null stops the run instead."""

    def __post_init__(self) -> None:
        at_least("reward.workers", self.workers, 1)
        above("reward.timeout_s", self.timeout_s, 0)


@dataclass(frozen=True)
class ClusterConfig:
    """Where processes run. `address: null` starts Ray on this host for the length of the run."""

    address: str | None = None
    """Address of a running Ray cluster, or `auto`."""
    in_process: bool = False
    """No Ray at all: one engine and the eager learner in this process (tests, debugging, studies on a
    laptop). Rewards then have no deadline."""
    device: str = "auto"
    """auto | cpu | cuda."""
    colocated: bool = False
    """Learner ranks and engines share the GPUs of one host; engines sleep during the update."""
    placement_timeout_s: float = 600.0
    """Longest wait for the cluster to grant the asked resources."""
    plan_gpu: str | None = None
    """`gspo plan`: the kind of GPU (H100, H200, ...); null plans a CPU host."""
    plan_nodes: int = 1
    plan_gpus_per_node: int | None = None
    """`gspo plan`: null takes the GPU's own (8; 4 for GB200)."""
    plan_model: str | None = None
    """`gspo plan`: a known model's name, where model.path is not on this host."""

    def __post_init__(self) -> None:
        choose("cluster.device", self.device, ("auto", "cpu", "cuda"))
        above("cluster.placement_timeout_s", self.placement_timeout_s, 0)
        at_least("cluster.plan_nodes", self.plan_nodes, 1)
        at_least("cluster.plan_gpus_per_node", self.plan_gpus_per_node, 1)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = "auto"
    """auto (online with a key, else offline) | online | offline | off."""
    project: str = "gspo_dist"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        choose("logger.wandb.mode", self.mode, ("auto", "online", "offline", "off"))


@dataclass(frozen=True)
class LoggerConfig:
    """What is shown and kept."""

    console: bool = True
    samples_per_step: int = 4
    """Rollouts written to samples.jsonl (and a W&B table) each step."""
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        at_least("logger.samples_per_step", self.samples_per_step, 0)


@dataclass(frozen=True)
class FlipsConfig:
    """Live routing-flip rates, whether or not replay is on (routing/flips.py)."""

    every: int = 5
    """Measure every so many steps; 0 never. A measurement is one small forward pass before the step's update and one
    after each mini-batch (benchmarks/bench_routing_replay.py prints its share)."""
    sequences: int = 8
    """Rollouts of the sample (spread over the ranks)."""

    def __post_init__(self) -> None:
        at_least("flips.every", self.every, 0)
        at_least("flips.sequences", self.sequences, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 0
    """Save every so many steps; 0 saves only after the last one."""
    keep: int = 2
    """Newest checkpoints kept."""
    resume: bool = True
    """Go on from the newest whole checkpoint of run_dir, if there is one."""
    save_last: bool = True

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy before, during and after training."""

    every: int = 0
    """Evaluate every so many steps; 0 only before and after."""
    prompts: int = 256
    """Held-out prompts; all of them when fewer."""
    samples: int = 1
    """Completions a prompt (accuracy is their mean: avg@samples)."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.prompts", self.prompts, 1)
        at_least("evaluation.samples", self.samples, 1)
        at_least("evaluation.temperature", self.temperature, 0.0)
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"evaluation.top_p must be in (0, 1]: got {self.top_p}; 1 samples from the whole distribution"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    run_dir: str = "runs/default"
    """Folder of everything the run writes."""
    seed: int = 0
    """Every random choice of the run derives from it."""
    steps: int = 100
    """Steps: each collects prompts_per_step x group_size rollouts and makes `mini_batches` optimiser steps."""
    mini_batches: int = 4
    """Optimiser steps a rollout batch (the paper: 4)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    flips: FlipsConfig = field(default_factory=FlipsConfig)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("mini_batches", self.mini_batches, 1)
        if self.rollout.prompts_per_step % self.mini_batches:
            raise ValueError(
                "mini_batches must divide rollout.prompts_per_step (groups are kept whole): got "
                f"{self.mini_batches} and {self.rollout.prompts_per_step}; try "
                f"{_divisors(self.rollout.prompts_per_step)}"
            )
        per_mini = self.rollout.rollouts_per_step // self.mini_batches
        if per_mini < self.learner.data_parallel:
            raise ValueError(
                f"a mini-batch must give every data-parallel rank a rollout: got {per_mini} rollouts for "
                f"{self.learner.data_parallel} ranks; raise rollout.prompts_per_step or lower mini_batches"
            )
        if self.learner.token_budget < self.rollout.max_model_len:
            raise ValueError(
                "learner.token_budget must hold the longest sequence (sequences are never cut): got "
                f"{self.learner.token_budget} for rollout.max_prompt_tokens + rollout.max_completion_tokens = "
                f"{self.rollout.max_model_len}; raise the budget or shorten the sequences"
            )
        advantage = self.objective.advantage_name
        if self.rollout.group_size == 1 and advantage != "none":
            raise ValueError(
                f"rollout.group_size must be at least 2 for {advantage} advantages (a group of one has no "
                "baseline): got 1; raise it or set objective.advantage=none"
            )
        if self.cluster.in_process and (self.rollout.engines != 1 or self.reward.workers != 1):
            raise ValueError(
                "cluster.in_process runs one engine and one reward function in this process: got rollout.engines "
                f"{self.rollout.engines} and reward.workers {self.reward.workers}; set both to 1"
            )
        if self.cluster.in_process and self.learner.backend != "eager":
            raise ValueError(
                f"cluster.in_process needs learner.backend eager: got {self.learner.backend}; unset one of them"
            )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
