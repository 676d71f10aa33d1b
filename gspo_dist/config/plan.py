"""What `gspo plan` assumes. A run itself reads none of it."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import above, at_least


@dataclass(frozen=True)
class PlanConfig:
    """What `gspo plan` assumes: the hardware, and the model where the run's own is not on this host."""

    gpu: str | None = None
    """The kind of GPU (H100, H200, ...). Null plans a CPU host."""
    nodes: int = 1
    """Hosts of the cluster."""
    gpus_per_node: int | None = None
    """GPUs per host. Null takes the GPU's own number (8, for GB200 4)."""
    model: str | None = None
    """The model to plan instead of the run's own: a known name (Qwen3-30B-A3B), or an HF folder."""
    fallback_model: str | None = None
    """The model to plan where model.path is not on this host and `model` is null (for experiments to set)."""
    host_gib: float | None = None
    """Memory of one host, in GiB. Null takes 1536 for a GPU host and 16 for a CPU host."""
    network_gb_s: float | None = None
    """Each GPU's share of its host's network cards, in 1e9 bytes per second. Null takes the GPU's own number
    (gspo_dist/planner/hardware.py)."""
    storage_gb_s: float = 2.0
    """What each of the learner's hosts writes to the shared file system, in 1e9 bytes per second."""
    prompt_mean: float | None = None
    """Mean tokens of a prompt. Null takes half of rollout.max_prompt_tokens, or as large a share of it as
    completions fill of theirs, where those are known."""
    length_mean: float | None = None
    """Mean tokens of a completion. Null takes half of rollout.max_completion_tokens."""
    length_spread: float = 0.8
    """Standard deviation of the logarithm of a completion's length, before it is cut at the limit."""
    lengths_from: str | None = None
    """A run folder, or its samples.jsonl, whose completions give mean and spread instead."""
    learner_speed: float = 1.0
    """The learner's planned seconds over its real ones. `gspo plan --calibrate=RUN` measures it."""
    engine_speed: float = 1.0
    """The engines' planned seconds over their real ones. `gspo plan --calibrate=RUN` measures it."""

    def __post_init__(self) -> None:
        at_least("plan.length_spread", self.length_spread, 0.0)
        for name in (
            "host_gib",
            "network_gb_s",
            "storage_gb_s",
            "prompt_mean",
            "length_mean",
            "learner_speed",
            "engine_speed",
        ):
            above(f"plan.{name}", getattr(self, name), 0.0)
        if self.length_mean is not None and self.lengths_from is not None:
            raise ValueError(
                f"plan.length_mean and plan.lengths_from both give the mean: got {self.length_mean:g} and "
                f"{self.lengths_from}; leave one of them out"
            )
        at_least("plan.nodes", self.nodes, 1)
        at_least("plan.gpus_per_node", self.gpus_per_node, 1)
        for name in ("gpu", "model", "fallback_model", "lengths_from"):
            if getattr(self, name) == "":
                raise ValueError(
                    f"plan.{name} needs a value: got none; leave it out, or write plan.{name}=null"
                )
