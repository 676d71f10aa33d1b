"""Saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass, field

from gspo_dist.checks import at_least


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 0
    """Save every so many steps. 0 saves only after the last one."""
    keep: int = 2
    """Newest checkpoints kept."""
    resume: bool = True
    """Go on from the newest whole checkpoint of run_dir, if there is one."""
    save_last: bool = True
    """Save after the last step, whatever `every` is. Studies set this to false: they need no weights."""
    hf_every: int = 0
    """Write the weights alone as an HF folder, `run_dir/hf/step-...`, every so many steps and after the last.
    0 writes none. With `save_last` false a finished run keeps no optimiser states."""
    keep_hf: int = 2
    """Newest of these folders kept."""
    restarts: int = 3
    """Times that a run whose learner died goes on by itself from its newest checkpoint, without a new one in
    between. Engines and reward workers that die need none of them."""
    accept: list[str] = field(default_factory=list)
    """Knobs or whole sections (reward, data.train, learner.optimizer.lr) that may differ from the run that is
    resumed. Without it a resume refuses every change that concerns the steps already done."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.hf_every", self.hf_every, 0)
        at_least("checkpoint.keep_hf", self.keep_hf, 1)
        at_least("checkpoint.restarts", self.restarts, 0)
