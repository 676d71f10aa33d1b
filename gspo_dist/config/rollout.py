"""The rollout engines, what they sample, and how they get new weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import above, at_least, choose

PROBE_SEQUENCES = 4
"""Sequences of the log-prob probe. Enough that every engine and every layer is exercised, few enough that the
probe hides in the sync's own time.
"""
PROBE_TOKENS = 512
"""Of each completion in the probe. vLLM 0.30 computes all prompt log-probs of a request at once, so a long
one takes gigabytes.
"""


@dataclass(frozen=True)
class WeightSyncConfig:
    """How new weights reach the engines, and how each transfer is checked."""

    transport: str = "auto"
    """auto (nccl between GPUs; otherwise shm where all share a host, else gloo) | nccl | gloo | shm."""
    bucket_mib: int = 256
    """Tensors travel in buckets of about this size. At most two buckets are in host memory at once."""
    check: bool = True
    """Compare version and checksum of what arrived after every transfer."""
    probe_every: int = 10
    """Every so many syncs also compare log-probs of engine and learner on fresh rollouts. 0: only once."""
    probe_tolerance: float | None = None
    """Largest mean |difference| of log-probs (nats) that the probe accepts. Null follows the precision and
    what this run has shown before (weights/tolerance.py): twice its own mismatch warns, 8 times stops."""
    timeout_s: float = 600.0
    """Longest that sending one publication may take. The exporter gives up on the engines after 0.9 of it,
    and an engine on a bucket sooner, so that an error names the side that failed."""

    def __post_init__(self) -> None:
        choose("rollout.weight_sync.transport", self.transport, ("auto", "nccl", "gloo", "shm"))
        at_least("rollout.weight_sync.bucket_mib", self.bucket_mib, 1)
        at_least("rollout.weight_sync.probe_every", self.probe_every, 0)
        above("rollout.weight_sync.probe_tolerance", self.probe_tolerance, 0)
        above("rollout.weight_sync.timeout_s", self.timeout_s, 0)

    @property
    def bucket_bytes(self) -> int:
        """`bucket_mib` in bytes."""
        return self.bucket_mib << 20


@dataclass(frozen=True)
class RolloutConfig:
    """The rollout engines and what they sample."""

    engine: str = "vllm"
    """vllm | reference (the HF model in float32 on the CPU, every prefix recomputed: small models only)."""
    engines: int = 1
    """Engine processes. The pool balances prompts over them."""
    tensor_parallel: int = 1
    """GPUs per engine; processes per engine on a CPU host."""
    precision: str = "bf16"
    """fp32 | bf16 | fp16: of the engine's weights and activations."""
    prompts_per_step: int = 64
    """Prompts that a step takes, one group of completions for each."""
    group_size: int = 16
    """Completions per prompt (the paper's G)."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    max_completion_tokens: int = 8192
    """Tokens after which a completion is cut off."""
    length_schedule: list[Any] = field(default_factory=list)
    """Lengthens generation: [[1, 1024], [100, 4096]] cuts completions off at 1,024 tokens from step 1 on, and
    at 4,096 from step 100 on. Engines, budgets and dr_grpo's constant keep max_completion_tokens, which no
    entry may exceed. Empty: max_completion_tokens throughout."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs of engine and learner are of the distribution at this temperature."""
    top_p: float = 1.0
    """Must be 1. Below it, engine log-probs are of the truncated distribution, which no learner computes."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that an engine may take."""
    kv_cache_gib: float = 1.0
    """KV cache of each engine on a CPU host."""
    max_num_seqs: int | None = None
    """Sequences that an engine decodes at once. Null takes what its KV cache on GPUs holds at a quarter of
    the longest length, at most its share of a step and at least 256; on a CPU host 256."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: the engine starts sooner and decodes more slowly."""
    threads: int = 0
    """CPU threads of each engine. 0 shares the cores that this process may use among the engines, and the
    environment's OMP_NUM_THREADS caps the share."""
    expert_parallel: bool = False
    """Shard an engine's experts over its tensor-parallel GPUs."""
    batch_invariant: bool = False
    """Kernels of vLLM whose result for a sequence does not depend on its neighbours in the batch, so that
    samples repeat whatever the batch. On GPUs (compute capability 8.0 and later) decoding is then slower; on
    a CPU one kernel for small bf16 weights is left out (learner.consistency=exact does so by itself)."""
    steps_ahead: int = 0
    """Steps before its turn that a step may be begun: engines sample on while the learner works, and what a
    publication finds unfinished goes on under the new weights. No token is older than so many publications.
    0: a step is sampled, then trained."""
    ticks_per_step: int | None = None
    """Decode steps that every engine does while the learner works, so that a run repeats itself. null: as
    many as fit; ticks.jsonl keeps them."""
    replay_ticks: str | None = None
    """The ticks.jsonl of an earlier run, whose decode steps are done again one by one."""
    timeout_s: float = 600.0
    """Longest wait for an engine's answer, and for a new token. An engine that is silent for so long
    counts as dead."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """How new weights reach the engines."""

    def __post_init__(self) -> None:
        choose("rollout.engine", self.engine, ("vllm", "reference"))
        choose("rollout.precision", self.precision, ("fp32", "bf16", "fp16"))
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
        if self.batch_invariant and self.engine != "vllm":
            raise ValueError(
                f"rollout.batch_invariant chooses kernels of vLLM: got engine {self.engine}; leave it out"
            )
        self._check_schedule()
        above("rollout.temperature", self.temperature, 0.0)
        if self.top_p != 1.0:
            raise ValueError(
                f"rollout.top_p must be 1 for training: got {self.top_p}; truncated sampling gives "
                "log-probs of another distribution than the learner's (evaluation.top_p may be set freely)"
            )
        above("rollout.kv_cache_gib", self.kv_cache_gib, 0.0)
        above("rollout.timeout_s", self.timeout_s, 0)
        at_least("rollout.threads", self.threads, 0)
        self._check_ahead()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"rollout.gpu_memory_utilization must be in (0, 1]: got {self.gpu_memory_utilization}"
            )

    def _check_ahead(self) -> None:
        at_least("rollout.steps_ahead", self.steps_ahead, 0)
        if self.ticks_per_step is not None:
            at_least("rollout.ticks_per_step", self.ticks_per_step, 0)
        for name in ("ticks_per_step", "replay_ticks"):
            got = getattr(self, name)
            if got is not None and not self.steps_ahead:
                raise ValueError(
                    f"rollout.{name} needs rollout.steps_ahead of at least 1: got {got!r} and 0, where "
                    "nothing is sampled while the learner works and a run repeats itself anyway; unset it, "
                    "or raise steps_ahead"
                )
        if self.ticks_per_step is not None and self.replay_ticks is not None:
            raise ValueError(
                "rollout.ticks_per_step and rollout.replay_ticks are two ways to fix the decode steps: got "
                f"{self.ticks_per_step} and {self.replay_ticks!r}; unset one of them"
            )

    def _check_schedule(self) -> None:
        steps = []
        for entry in self.length_schedule:
            pair = list(entry) if isinstance(entry, (list, tuple)) else []
            if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in pair):
                raise ValueError(
                    "rollout.length_schedule must be pairs [step, tokens] of whole numbers from 1 on: got "
                    f"{entry!r}; for example [[1, 1024], [100, 4096]]"
                )
            if pair[1] > self.max_completion_tokens:
                raise ValueError(
                    "rollout.length_schedule must stay within rollout.max_completion_tokens, for which the "
                    f"engines' context and the token budget are made: got {pair[1]} tokens from step "
                    f"{pair[0]} on and {self.max_completion_tokens}; raise max_completion_tokens, as far as "
                    "the model's context allows, or shorten the schedule"
                )
            steps.append(pair[0])
        if steps and (steps[0] != 1 or steps != sorted(set(steps))):
            raise ValueError(
                f"rollout.length_schedule must begin with step 1 and go up: got the steps {steps}"
            )

    def completion_tokens(self, step: int) -> int:
        """Tokens after which a completion of `step` is cut off.

        Example: [[1, 8], [3, 16]] gives 8 for steps 1 and 2, and 16 from step 3 on.
        """
        known = [tokens for first, tokens in self.length_schedule if first <= step]
        return known[-1] if known else self.max_completion_tokens

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and completion together, in tokens."""
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts that one step collects."""
        return self.prompts_per_step * self.group_size
