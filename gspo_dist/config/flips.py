"""Live rates of routing flips."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import at_least


@dataclass(frozen=True)
class FlipsConfig:
    """Live routing-flip rates, whether or not replay is on (routing/flips.py)."""

    every: int = 5
    """Measure every so many steps. 0: never. A measurement is one small forward pass before the step's update
    and one after each mini-batch (benchmarks/bench_routing_replay.py prints its share)."""
    sequences: int = 8
    """Rollouts of the sample, spread over the replicas."""

    def __post_init__(self) -> None:
        at_least("flips.every", self.every, 0)
        at_least("flips.sequences", self.sequences, 1)
