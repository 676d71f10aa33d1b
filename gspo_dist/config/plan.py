"""What `gspo plan` assumes. A run itself reads none of it."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import at_least


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
    length_spread: float = 0.8
    """Standard deviation of the logarithm of a completion's length, before it is cut at the limit. The mean
    is taken as half of the limit."""
    lengths_from: str | None = None
    """A run folder whose samples give mean and spread instead."""

    def __post_init__(self) -> None:
        at_least("plan.length_spread", self.length_spread, 0.0)
        at_least("plan.nodes", self.nodes, 1)
        at_least("plan.gpus_per_node", self.gpus_per_node, 1)
        for name in ("gpu", "model", "fallback_model", "lengths_from"):
            if getattr(self, name) == "":
                raise ValueError(
                    f"plan.{name} needs a value: got none; leave it out, or write plan.{name}=null"
                )
