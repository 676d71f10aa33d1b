"""How far an engine's log-probs may be from the learner's before a weight sync counts as wrong.

Engine and learner compute the same policy by other kernels, and the difference depends on precision, model
and text: 1e-6 nats per token in fp32, 0.005 to 0.03 for language models in bf16, more where logits are
peaked. No constant tells that from a wrong sync. So a run is its own measure:

    identity   the first publication of a new run sends the weights that the engines have loaded. Their
               log-probs must be what they were before, to the engine's own repeatability. One expert in
               the wrong place shows, however large the mismatch is. Where a tensor lands does not depend on
               its values, so what is right once is right for the run.
    mismatch   what the engines said before any publication was no sync's fault. It is the run's own mismatch,
               followed by the median of the probes that passed since. A probe at `WARN` times as much is
               said, and at `STOP` times as much the run stops.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from gspo_dist.weights.verify import WeightSyncError, probe_difference

log = logging.getLogger(__name__)

WARN = 2.0
"""Times the run's own mismatch. Adjacent probes of one policy differ by less than half."""
STOP = 8.0
"""Times the run's own mismatch. Two layers of a small model in each other's place gave 24 to 100 times it."""
REMEMBERED = 5
"""Probes whose median is the run's own mismatch, so that it follows a policy that sharpens."""
REPEATS = 3.0
"""Times the engine's repeatability that the identity may be off by. On a CPU both are exactly 0."""


@dataclass(frozen=True)
class Levels:
    """Mean |difference| per token, in nats, that one precision explains without knowing the run."""

    warn: float
    """Above it a probe is said."""
    least_stop: float
    """No probe below it stops a run: a single token whose route differs moves a short probe by as much."""
    unknown_stop: float
    """Stops a run whose own mismatch is not known: no precision explains it."""
    repeat: float
    """Repeatability that the identity grants where an engine repeats itself exactly."""


LEVELS = {
    "fp32": Levels(1e-3, 2e-2, 2e-2, 1e-6),
    "fp16": Levels(1e-2, 5e-2, 2e-1, 2e-5),
    "bf16": Levels(5e-2, 1e-1, 5e-1, 1e-4),
}
"""By the coarser precision of the two sides. In bf16 correct engines were seen up to 0.16 (random weights,
sharpened logits), and language models below 0.035."""


class ProbeTolerance:
    """The limits of a run's probes, and the mismatch that they follow."""

    def __init__(self, precision: str, fixed: float | None) -> None:
        """precision: the coarser one of engine and learner.
        fixed: the user's own limit (rollout.weight_sync.probe_tolerance), which then is the only one.
        """
        self.levels = LEVELS[precision]
        self.fixed = fixed
        self.means: list[float] = []
        """Mean |difference| of the newest probes that passed."""

    @property
    def own(self) -> float | None:
        """The run's own mismatch in nats; None before the first probe."""
        return median(self.means) if self.means else None

    @property
    def warn_above(self) -> float:
        """Mean |difference| above which a probe is said."""
        if self.fixed is not None:
            return self.fixed
        return max(self.levels.warn, WARN * (self.own or 0.0))

    @property
    def stop_above(self) -> float:
        """Mean |difference| above which the run stops."""
        if self.fixed is not None:
            return self.fixed
        if self.own is None:
            return self.levels.unknown_stop
        return max(self.levels.least_stop, STOP * self.own)

    def check(self, mean: float, largest: float, *, engine: str, policy_version: int) -> None:
        """Judges one engine's probe. WeightSyncError above `stop_above`, or when the mean is nan."""
        if not mean <= self.stop_above:  # also refuses nan
            raise WeightSyncError(
                f"{engine} and learner disagree after the sync of version {policy_version}: mean "
                f"|difference| of log-probs {mean:.3g} nats (max {largest:.3g}), and at most "
                f"{self.stop_above:.3g} {self._reason()}; the engine computes another policy than the "
                "learner although its bytes may have arrived: check that precision and temperature are the "
                "same on both sides, or set rollout.weight_sync.probe_tolerance if you know why"
            )
        if mean > self.warn_above:
            log.warning(
                "%s and learner differ more than usual after the sync of version %d: mean |difference| of "
                "log-probs %.3g nats (max %.3g), expected below %.3g; the run stops above %.3g",
                engine,
                policy_version,
                mean,
                largest,
                self.warn_above,
                self.stop_above,
            )

    def _reason(self) -> str:
        """Where the limit comes from."""
        if self.fixed is not None:
            return "is rollout.weight_sync.probe_tolerance"
        if self.own is None:
            return "can be precision"
        return f"can be mismatch, which was {self.own:.3g} in this run so far"

    def accept(self, mean: float) -> None:
        """Takes a publication's mean |difference| (its worst engine's) into the run's own mismatch."""
        self.means = [*self.means, mean][-REMEMBERED:]

    def check_identity(
        self,
        before: Mapping[str, Sequence[np.ndarray]],
        again: Mapping[str, Sequence[np.ndarray]],
        after: Mapping[str, Sequence[np.ndarray]],
    ) -> None:
        """Log-probs by engine around a publication of the weights that the engines had loaded.

        before, again: the same question asked twice before it; after: once more after it. An engine that
        died on the way has no answer, and none that came back was asked before.

        WeightSyncError where they changed by more than the engine's repeatability. A user who has set a
        tolerance is only warned.
        """
        for engine in [name for name in before if name in again and name in after]:
            rows = before[engine]
            repeat, _ = probe_difference(rows, again[engine])
            changed, largest = probe_difference(rows, after[engine])
            limit = self.levels.repeat + REPEATS * repeat
            if changed <= limit:
                log.info("%s repeats itself to %.3g nats, before and after a sync", engine, changed)
                continue
            text = (
                f"{engine} computes another policy after a sync of the very weights that it had loaded: mean "
                f"|difference| of its own log-probs {changed:.3g} nats (max {largest:.3g}), and it repeats "
                f"itself to {repeat:.3g}; a tensor landed in another place or was cast on its way (an "
                "expert, a layer, a norm): compare rollout.precision and learner.precision with the model "
                "folder's"
            )
            if self.fixed is None:
                raise WeightSyncError(f"{text}, or set rollout.weight_sync.probe_tolerance if you know why")
            log.warning("%s", text)
