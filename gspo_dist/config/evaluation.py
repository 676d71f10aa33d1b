"""Held-out accuracy before, during and after training, and benchmark suites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import at_least


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy before, during and after training, and benchmark suites."""

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
    suites: list[str] = field(default_factory=list)
    """Benchmarks: aime24, aime25, amc, math500, gsm8k, livecodebench, livecodebench_paper, codeforces,
    humaneval, or names of your own that `options` describes. A run evaluates them when it evaluates held-out
    prompts, before its first step too."""
    options: dict[str, Any] = field(default_factory=dict)
    """Suite -> its options (samples, temperature, top_p, max_tokens, limit, file, ...). `all` is for every
    suite. gspo_dist/evaluation/README.md lists them."""
    endpoint: str | None = None
    """Base of an OpenAI-compatible endpoint (http://host:8000/v1) that `gspo evaluate` asks instead of
    starting engines."""
    endpoint_model: str = "default"
    """The model's name at the endpoint."""
    endpoint_concurrency: int = 32
    """Requests at a time."""

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.prompts", self.prompts, 1)
        at_least("evaluation.samples", self.samples, 1)
        at_least("evaluation.temperature", self.temperature, 0.0)
        at_least("evaluation.endpoint_concurrency", self.endpoint_concurrency, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"evaluation.top_p must be in (0, 1]: got {self.top_p}; 1 samples from the whole distribution"
            )
        if len(set(self.suites)) < len(self.suites):
            raise ValueError(f"evaluation.suites must be suites without repeats: got {self.suites}")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"evaluation.endpoint must be an address that begins with http: got {self.endpoint}"
            )
