"""Where a step's old log-probs come from.

`rollout`: the engine's own numbers, so nothing runs before the update. `recompute`: one forward pass of the
learner over the batch. That pass is also where R2 records the experts that the update replays. Under R3 it
replays the engine's. The guard over engine log-probs (guard.py) can ask for recomputation too.
"""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.config import ObjectiveConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.packing import MiniBatch
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.types import Rollout


class OldLogprobs:
    """Completes a step's mini-batches before the update: reference and old log-probs, and the
    routes to replay.
    """

    def __init__(self, config: ObjectiveConfig, learner: LearnerGroup, guard: OffsetGuard) -> None:
        self.config = config
        self.learner = learner
        self.guard = guard
        self.recomputed = False
        """Whether the step under way uses the learner's own log-probs."""

    def prepare(
        self, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout], step: int
    ) -> list[MiniBatch]:
        """The mini-batches with old log-probs (the engine's stay as packed), R2's routes
        and reference log-probs.
        """
        ready = list(mini_batches)
        if self.config.kl_coef > 0:
            ready = [m.with_reference(self.learner.logprobs(m.micro_batches, reference=True)) for m in ready]
        self.guard.begin_step(ready, rollouts, step)
        self.recomputed = self.config.old_logprobs == "recompute" or self.guard.wants_recompute
        if not self.recomputed:
            return ready
        record = self.config.routing_replay == "r2"
        # Only where they are read: they are 8 bytes for every token, layer and expert.
        scores = {"record_scores": True} if "router_shift" in self.guard.objective.spec.reads else {}
        return [
            m.with_outputs(
                self.learner.logprobs(
                    self.with_routes(m, rollouts).micro_batches, record_routing=record, **scores
                ),
                keep_routing=record,
            )
            for m in ready
        ]

    def with_routes(self, mini: MiniBatch, rollouts: Sequence[Rollout]) -> MiniBatch:
        """The mini-batch with the routes that the learner must replay.

        R2's are in it already. R3's are those of its rollouts, which hold the batch's traces once. The copy
        that is made here is meant to live only as long as its use.
        """
        return mini.with_traces(rollouts) if self.config.routing_replay == "r3" else mini

    def metrics(self) -> dict[str, float]:
        """old_logprobs/recomputed: 1 when the learner recomputed, 0 when the engine's numbers were used."""
        return {"old_logprobs/recomputed": float(self.recomputed)}
