"""How fast a run really was, against its own plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gspo_dist.planner.throughput import StepTime

WARM_UP = 2
"""First steps of a run that are left out: kernels are compiled and caches filled in them."""


@dataclass(frozen=True)
class Speeds:
    """The planned seconds of a run over its real ones."""

    learner: float
    """Log-probs and update. What plan.learner_speed takes."""
    engine: float | None
    """Sampling. What plan.engine_speed takes. None where learner and engines overlap, so that
    time/collect_s is a wait."""
    steps: int
    """Steps that were looked at."""


def speeds(rows: Sequence[Mapping[str, Any]], planned: StepTime, steps_ahead: int) -> Speeds:
    """From the rows of metrics.jsonl and the plan of the same run at speeds of 1.

    Raises ValueError without a step after the first two.
    """
    steps = [row for row in rows if row.get("time/update_s")][WARM_UP:]
    if not steps:
        raise ValueError(
            f"--calibrate needs a run of more than {WARM_UP} steps with time/update_s in its metrics.jsonl: "
            f"got {len(rows)} rows; let it run a few steps more"
        )

    def seconds(*keys: str) -> float:
        return median(sum(float(row.get(key) or 0.0) for key in keys) for row in steps)

    learner = (planned.train_s + planned.logprobs_s) / seconds("time/update_s", "time/old_logprobs_s")
    sampled = seconds("time/collect_s")
    engine = planned.collect_s / sampled if sampled and not steps_ahead else None
    return Speeds(learner, engine, len(steps))
