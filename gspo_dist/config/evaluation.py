"""Held-out accuracy before, during and after training."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import at_least


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy before, during and after training."""

    every: int = 0
    """Evaluate every so many steps. 0: only before and after."""
    prompts: int = 256
    """Held-out prompts. All of them where there are fewer."""
    samples: int = 1
    """Completions per prompt. Accuracy is their mean (avg@samples)."""
    temperature: float = 0.0
    """Sampling temperature. 0 is greedy."""
    top_p: float = 1.0
    """Share of the probability that is sampled from. 1: the whole distribution."""

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.prompts", self.prompts, 1)
        at_least("evaluation.samples", self.samples, 1)
        at_least("evaluation.temperature", self.temperature, 0.0)
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"evaluation.top_p must be in (0, 1]: got {self.top_p}; 1 samples from the whole distribution"
            )
