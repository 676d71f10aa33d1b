"""Where the old log-probs of a step come from, and the guard over engine log-probs.

`rollout`: the engine's own numbers; nothing runs before the update. `recompute`: one forward pass of the learner over
the batch (R2 records its routes there; R3 replays the engine's in it and in the update). With engine log-probs the mean log ratio of the first mini-batch measures the
offset that the mismatch engine / learner puts on every sequence ratio (objectives/offset.py); the guard acts on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gspo_dist.config import ObjectiveConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.learners.loss import LossSpec, trained_index
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.aggregate import Segments
from gspo_dist.objectives.objective import Objective
from gspo_dist.objectives.offset import (
    GuardDecision,
    OffsetEstimate,
    batch_offset,
    choose_subset,
    make_guard,
    offset_from_moments,
)
from gspo_dist.packing import MiniBatch, take_sequences
from gspo_dist.types import Rollout

log = logging.getLogger(__name__)


OWN_MEAN_FROM = 16
"""Sequences from which a micro-batch's own mean is taken out of it: the mean of S removes 1/S of the spread too."""


def _sequences(mini: MiniBatch) -> int:
    """Sequences of the smallest micro-batch."""
    return min(b.num_sequences for rank in mini.micro_batches for b in rank)


class LogprobContract:
    """Prepares the old log-probs of each step, decides each mini-batch's offset, watches the mismatch."""

    def __init__(
        self, config: ObjectiveConfig, objective: Objective, learner: LearnerGroup, seed: int
    ) -> None:
        self.config = config
        self.objective = objective
        self.learner = learner
        self.seed = seed
        self.guard = make_guard(config.guard, objective.clip)
        self.decision = GuardDecision("none", 0.0, False, "no measurement yet")
        self.metrics: dict[str, float] = {}

    def prepare(
        self, mini_batches: list[MiniBatch], rollouts: Sequence[Rollout], step: int
    ) -> list[MiniBatch]:
        """Mini-batches with their old log-probs (engine's: left as packed), R2's routes and reference log-probs."""
        self.metrics = {}
        if self.config.kl_coef > 0:
            mini_batches = [m.with_reference(self.learner.logprobs(m, reference=True)) for m in mini_batches]
        self.recomputed = self.config.old_logprobs == "recompute"
        if not self.recomputed and self._measures_subset():
            self._observe(self._subset_offset(mini_batches, rollouts, step))
        if not self.recomputed and self.decision.action == "recompute":
            self.recomputed = True
        self.metrics["contract/recomputed"] = float(self.recomputed)
        if not self.recomputed:
            return mini_batches
        record = self.config.routing_replay == "r2"
        return [
            m.with_outputs(
                self.learner.logprobs(self.replayed(m, rollouts), record_routing=record), keep_routing=record
            )
            for m in mini_batches
        ]

    def replayed(self, mini: MiniBatch, rollouts: Sequence[Rollout]) -> MiniBatch:
        """The mini-batch with the routes that the learner must replay: R2's are in it already, R3's are those of its
        rollouts. The batch's traces are held once, by the rollouts; the copy made here lives as long as its use."""
        if self.config.routing_replay != "r3":
            return mini
        start = time.perf_counter()
        routed = mini.with_traces(rollouts)
        seconds = self.metrics.get("routing/replay_attach_s", 0.0) + time.perf_counter() - start
        self.metrics["routing/replay_attach_s"] = seconds
        return routed

    def loss_spec(self, mini: MiniBatch, index: int) -> LossSpec:
        """The loss of mini-batch `index` of this step."""
        recentring = not self.recomputed and self.decision.action == "recentre"
        # This step's own offset is not known before its first forward pass, so each micro-batch takes out its own.
        own_mean = (
            recentring
            and index == 0
            and self.config.guard.estimator == "batch"
            and _sequences(mini) >= OWN_MEAN_FROM
        )
        return LossSpec(
            self.objective,
            mini.denominators,
            self.config.correction,
            offset=self.decision.offset if recentring and not own_mean else 0.0,
            own_mean=own_mean,
            measure_mismatch=self.recomputed or index == 0,
        )

    def observe(self, stats: Mapping[str, Stat], index: int) -> None:
        """Takes in the first mini-batch's statistics: the policy has not moved yet, so its offset is mismatch."""
        if index != 0 or "mismatch/log_ratio_mean" not in stats:
            return
        count = round(float(stats["objective/sequences"].result()))
        measured = offset_from_moments(
            stats["mismatch/log_ratio_mean"].result(), stats["mismatch/log_ratio_square"].result(), count
        )
        if self.guard is not None:
            self.metrics["contract/offset_clip_widths"] = self.guard.clip.widths(measured.offset)
            if not self._measures_subset():
                self._observe(measured)
        self.metrics["contract/offset"] = measured.offset
        self.metrics["contract/offset_standard_error"] = measured.standard_error

    def _observe(self, measured: OffsetEstimate) -> None:
        if self.guard is None:
            return
        self.decision = self.guard.observe(measured)
        self.metrics["contract/guard_active"] = float(self.guard.active)
        self.metrics["contract/guard_offset"] = self.decision.offset
        if self.decision.changed:
            word = "acts" if self.guard.active else "rests"
            log.warning("log-prob guard %s (%s): %s", word, self.config.guard.action, self.decision.reason)

    def _measures_subset(self) -> bool:
        guard = self.config.guard
        return (
            guard.estimator == "subset"
            and guard.action in ("recentre", "recompute")
            and self.guard is not None
        )

    def _subset_offset(
        self, mini_batches: list[MiniBatch], rollouts: Sequence[Rollout], step: int
    ) -> OffsetEstimate:
        """The exact offset on a random subset of the batch's sequences: one small forward pass."""
        flat = [
            (b, s)
            for m in mini_batches
            for rank in m.micro_batches
            for b in rank
            for s in range(b.num_sequences)
        ]
        flat = [(b, s) for b, s in flat if b.loss_mask[int(b.cu_seqlens[s]) : int(b.cu_seqlens[s + 1])].any()]
        chosen = choose_subset(len(flat), self.config.guard.subset_fraction, self.seed * 1_000_003 + step)
        mini = take_sequences([flat[i] for i in chosen], ranks=len(mini_batches[0].micro_batches))
        outputs = self.learner.logprobs(self.replayed(mini, rollouts))
        learner, engine, ids, count = [], [], [], 0
        for rank, outs in zip(mini.micro_batches, outputs, strict=True):
            for batch, out in zip(rank, outs, strict=True):
                index = trained_index(batch)
                if len(index):
                    dense, sequences = _dense(batch.sequence_ids()[index])
                    learner.append(out.logprobs[index].double())
                    engine.append(batch.rollout_logprobs[index].double())
                    ids.append(dense + count)
                    count += sequences
        means = Segments(torch.cat(ids), count).mean(torch.cat(learner) - torch.cat(engine))
        return batch_offset(means.tolist(), population=len(flat))

    def state_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {"guard": self.guard.state_dict() if self.guard else None, "decision": asdict(self.decision)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self.decision = GuardDecision(**state["decision"])


def _dense(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sequence ids renumbered 0.. without gaps, and their count."""
    unique, dense = torch.unique(ids, return_inverse=True)
    return dense, len(unique)
