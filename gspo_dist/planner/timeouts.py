"""Would a timeout of the run end it? Each one against the seconds that the plan predicts for what it bounds.

rollout.timeout_s bounds a slice of sampling and the wait for a token, which no plan makes long.
reward.timeout_s and cluster.placement_timeout_s are left out too: how long a reward takes and when a cluster
grants its nodes is no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gspo_dist.config import RunConfig
from gspo_dist.planner.layout import Workload
from gspo_dist.planner.throughput import StepTime

ROUGH = 2.0
"""A prediction is right within this factor, so a timeout that is nearer than that is told."""


@dataclass(frozen=True)
class Timeout:
    """One knob, and what it bounds."""

    knob: str
    """As the command line takes it."""
    what: str
    """The call that it bounds."""
    allowed_s: float
    """Seconds that the run allows."""
    predicted_s: float
    """Seconds that the plan predicts."""

    @property
    def fires(self) -> bool:
        """The run would be ended by it."""
        return self.predicted_s > self.allowed_s

    @property
    def close(self) -> bool:
        """It would fire if the prediction were half of the truth."""
        return not self.fires and ROUGH * self.predicted_s > self.allowed_s

    @property
    def advice(self) -> str:
        """An override that leaves room for a prediction that is half of the truth."""
        return f"{self.knob}={2 * ROUGH * self.predicted_s:.0f}"


def timeouts(run: RunConfig, step: StepTime) -> tuple[Timeout, ...]:
    """Every timeout whose call the plan has a time for, each with the longest of its calls."""
    # A forward pass is shorter than an update, but for a pipeline that a large forward_token_budget starves.
    passes = max(1, Workload(run).forward_passes) * run.mini_batches
    learning = {
        "a mini-batch's update": step.train_s / run.mini_batches,
        "a mini-batch's log-probs": step.logprobs_s / passes,
        "the guard's subset": step.guard_s,
    }
    return (
        _longest("learner.timeout_s", run.learner.timeout_s, learning),
        _longest(
            "rollout.weight_sync.timeout_s",
            run.rollout.weight_sync.timeout_s,
            {"a publication": step.sync_s},
        ),
    )


def _longest(knob: str, allowed_s: float, calls: Mapping[str, float]) -> Timeout:
    what = max(calls, key=lambda call: calls[call])
    return Timeout(knob, what, allowed_s, calls[what])
