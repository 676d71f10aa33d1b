"""What is shown and kept of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from gspo_dist.checks import at_least, choose


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = "auto"
    """auto (online with a key, else offline) | online | offline | off."""
    project: str = "gspo_dist"
    """W&B project that the run is shown in."""
    entity: str | None = None
    """W&B user or team. Null: the key's own."""
    group: str | None = None
    """Group of runs that W&B shows together (a study gives its name)."""
    name: str | None = None
    """Name of the run. Null: W&B makes one up."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run (a study gives its name and the arm's)."""

    def __post_init__(self) -> None:
        choose("logger.wandb.mode", self.mode, ("auto", "online", "offline", "off"))


@dataclass(frozen=True)
class LoggerConfig:
    """What is shown and kept of a run."""

    console: bool = True
    """Print a line for every step."""
    samples_per_step: int = 4
    """Rollouts written to samples.jsonl (and a W&B table) each step."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        at_least("logger.samples_per_step", self.samples_per_step, 0)
