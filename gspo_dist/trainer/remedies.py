"""What a step on the engine's log-probs does about the age of its tokens: offsets by age, and a clip that
follows the spread.

Both come from the first mini-batch, where the policy has not moved yet. Its own loss takes what the step
before measured, and its own means where it has sequences enough; later mini-batches take what it measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gspo_dist.config import ObjectiveConfig
from gspo_dist.learners.loss import lags_of
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.objective import Objective
from gspo_dist.objectives.staleness import LAG, LagOffsets
from gspo_dist.packing import MiniBatch


class StalenessRemedies:
    """Holds what was measured, and makes of it what a mini-batch's loss takes."""

    def __init__(self, config: ObjectiveConfig, objective: Objective) -> None:
        self.config = config.staleness
        self.corrects = config.correction.name != "none"
        self.objective = objective
        self.offsets: dict[int, float] = {}
        """Lag -> mean log ratio over the tokens of that lag."""
        self.size = 0.0
        """Root mean square over sequences of the log ratio before learning; without its mean where offsets
        are taken out."""
        self.stale = False
        """Whether the step has tokens of older policies."""

    def begin_step(self, mini_batches: Sequence[MiniBatch], policy_version: int) -> None:
        """Looks how old the step's tokens are."""
        self.stale = any(
            lags_of(batch, policy_version) is not None for mini in mini_batches for batch in mini.batches()
        )

    def lag_offsets(self, index: int, *, recomputed: bool) -> LagOffsets | None:
        """What is taken out of the log ratios of mini-batch `index`."""
        if recomputed or not self.config.recentre:
            return None
        return LagOffsets(dict(self.offsets), own=index == 0)

    def widened(self, *, recomputed: bool) -> Objective:
        """The objective with the clip in force."""
        scale = 1.0 if recomputed else self.clip_scale
        if scale == 1.0:
            return self.objective
        clip = {name: self.objective.resolved[name] * scale for name in ("clip_low", "clip_high")}
        return replace(self.objective, params={**self.objective.resolved, **clip})

    @property
    def clip_scale(self) -> float:
        """By how much the clip is wider than its own size: at least 1, at most what `clip_max` allows.

        Example: clip 3e-4 / 4e-4, a size of 1e-3 and clip_spreads 2 make 6.67, the clip 2e-3 / 2.67e-3.
        """
        if not self.config.clip_spreads:
            return 1.0
        low, high = self.objective.resolved["clip_low"], self.objective.resolved["clip_high"]
        return min(max(1.0, self.config.clip_spreads * self.size / low), self.config.clip_max / high)

    def observe(self, stats: Mapping[str, Stat], fresh_offset: float | None) -> None:
        """Takes in the first mini-batch's statistics.

        fresh_offset: the mean log ratio of its fresh tokens; None: it has none.
        """
        self.offsets = {
            int(name.removeprefix(LAG)): stat.result() for name, stat in stats.items() if name.startswith(LAG)
        }
        if fresh_offset is not None:
            self.offsets[0] = fresh_offset
        if "objective/sequence_log_ratio_square" in stats:
            mean = stats["objective/sequence_log_ratio_mean"].result() if self.config.recentre else 0.0
            square = stats["objective/sequence_log_ratio_square"].result()
            self.size = math.sqrt(max(square - mean * mean, 0.0))

    def metrics(self, *, recomputed: bool) -> dict[str, float]:
        """staleness/* of the step that are no statistics of its tokens."""
        out: dict[str, float] = {}
        if self.stale:
            out["staleness/ignored"] = float(recomputed and not self.corrects)
        if self.config.clip_spreads:
            out["staleness/clip_scale"] = 1.0 if recomputed else self.clip_scale
        return out

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"offsets": {str(lag): offset for lag, offset in self.offsets.items()}, "size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self.offsets = {int(lag): offset for lag, offset in state["offsets"].items()}
        self.size = float(state["size"])
