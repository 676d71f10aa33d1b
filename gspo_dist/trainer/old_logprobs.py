"""Where a step's old log-probs come from.

`rollout`: the engine's own numbers, so nothing runs before the update. `recompute`: one forward pass of the
learner over the batch. That pass is also where R2 records the experts that the update replays. Under R3 it
replays the engine's. The guard over engine log-probs (guard.py) can ask for recomputation too.
"""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.config import ObjectiveConfig
from gspo_dist.learners.forward import logprobs_within
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.packing import MicroBatches, MiniBatch, with_traces
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.types import LogprobOutput, Rollout


class OldLogprobs:
    """Completes a step's mini-batches before the update: reference and old log-probs, and the
    routes to replay.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        learner: LearnerGroup,
        guard: OffsetGuard,
        forward_token_budget: int | None = None,
    ) -> None:
        """forward_token_budget: most tokens of a pass. None computes micro-batches as they are packed."""
        self.config = config
        self.learner = learner
        self.guard = guard
        self.forward_token_budget = forward_token_budget
        self.passes = 0
        """Forward passes of the step under way, over all replicas."""
        self.recomputed = False
        """Whether the step under way uses the learner's own log-probs."""

    def prepare(
        self, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout], step: int
    ) -> list[MiniBatch]:
        """The mini-batches with old log-probs (the engine's stay as packed), R2's routes
        and reference log-probs.
        """
        ready, self.passes = list(mini_batches), 0
        if self.config.kl_coef > 0:
            ready = [m.with_reference(self._logprobs(m, reference=True)) for m in ready]
        self.guard.begin_step(ready, rollouts, step)
        self.recomputed = self.config.old_logprobs == "recompute" or self.guard.wants_recompute
        if not self.recomputed:
            return ready
        record = self.config.routing_replay == "r2"
        # Only where they are read: they are 8 bytes for every token, layer and expert.
        scores = {"record_scores": True} if "router_shift" in self.guard.objective.spec.reads else {}
        routes = rollouts if self.config.routing_replay == "r3" else None
        return [
            m.with_outputs(self._logprobs(m, routes, record_routing=record, **scores), keep_routing=record)
            for m in ready
        ]

    def _logprobs(
        self, mini: MiniBatch, routes: Sequence[Rollout] | None = None, **options: bool
    ) -> list[list[LogprobOutput]]:
        """The learner's log-probs of a mini-batch. routes: the rollouts whose traces the pass replays."""

        def attach(batches: MicroBatches) -> MicroBatches:
            return batches if routes is None else with_traces(batches, routes)

        outputs, passes = logprobs_within(
            self.learner, mini.micro_batches, self.forward_token_budget, attach=attach, **options
        )
        self.passes += passes
        return outputs

    def with_routes(self, mini: MiniBatch, rollouts: Sequence[Rollout]) -> MiniBatch:
        """The mini-batch with the routes that the learner must replay.

        R2's are in it already. R3's are those of its rollouts, which hold the batch's traces once. The copy
        that is made here is meant to live only as long as its use.
        """
        return mini.with_traces(rollouts) if self.config.routing_replay == "r3" else mini

    def metrics(self) -> dict[str, float]:
        """old_logprobs/*: whether the learner recomputed, and how many passes it made for its log-probs and
        the reference's.
        """
        passes = {"old_logprobs/micro_batches": float(self.passes)} if self.passes else {}
        return {"old_logprobs/recomputed": float(self.recomputed)} | passes
