"""The guard over engine log-probs: measures their offset in the first mini-batch and decides what a step
does about it.

With old log-probs from the engine, the mean log ratio of the first mini-batch is what the mismatch engine /
learner puts on every sequence ratio: the policy has not moved yet (objectives/offset.py has the theory). The
guard warns, recentres later mini-batches, or asks for recomputation, as `objective.guard` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from gspo_dist.packing import MicroBatches, MiniBatch, with_traces
from gspo_dist.probes import take_sequences
from gspo_dist.types import Rollout

log = logging.getLogger(__name__)

OWN_MEAN_FROM = 16
"""Sequences from which a micro-batch may be recentred by its own mean: the mean of S sequences also takes 1/S
of their spread out, which is noise worth removing only when S is not small.
"""

SUBSET_SEED_STRIDE = 1_000_003
"""A prime larger than any number of steps: seed * stride + index gives each step of each seed a subset
of its own.
"""


class OffsetGuard:
    """Measures once per step, decides, and hands each mini-batch its loss. Idle where old
    log-probs are recomputed.
    """

    def __init__(
        self, config: ObjectiveConfig, objective: Objective, learner: LearnerGroup, seed: int
    ) -> None:
        self.config = config
        self.objective = objective
        self.learner = learner
        self.seed = seed
        self.guard = make_guard(config.guard, objective.clip)
        self.decision = GuardDecision("none", 0.0, False, "no measurement yet")
        self.measured: OffsetEstimate | None = None
        """The offset of this step's first mini-batch."""
        self.decided = False
        """Whether this step's measurement reached the guard."""

    @property
    def wants_recompute(self) -> bool:
        """Whether the last decision is to recompute old log-probs until the offset is small again."""
        return self.decision.action == "recompute"

    def begin_step(self, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout], step: int) -> None:
        """Forgets the last step's measurement. The estimator `subset` measures now, by one
        small forward pass.
        """
        self.measured, self.decided = None, False
        if self.config.old_logprobs != "recompute" and self._measures_subset():
            self._decide(self._subset_offset(mini_batches, rollouts, step))

    def loss_spec(self, mini: MiniBatch, index: int, *, recomputed: bool) -> LossSpec:
        """The loss of mini-batch `index` of this step; recentred while the guard acts by recentring.

        recomputed: the step's old log-probs are the learner's own, so there is no offset to take out.
        """
        recentring = not recomputed and self.decision.action == "recentre"
        smallest = min(batch.num_sequences for batch in mini.batches())
        # The estimator `batch` does not know this step's offset before its first forward pass, so the first
        # mini-batch is recentred by its own mean, where it has sequences enough.
        own_mean = (
            recentring and index == 0 and self.config.guard.estimator == "batch" and smallest >= OWN_MEAN_FROM
        )
        return LossSpec(
            self.objective,
            mini.denominators,
            self.config.correction,
            offset=self.decision.offset if recentring and not own_mean else 0.0,
            own_mean=own_mean,
            measure_mismatch=recomputed or index == 0,
        )

    def observe(self, stats: Mapping[str, Stat], index: int) -> None:
        """Takes in a mini-batch's statistics. Only the first one's offset is mismatch: after it the
        policy has moved.
        """
        if index != 0 or "mismatch/log_ratio_mean" not in stats:
            return
        self.measured = offset_from_moments(
            stats["mismatch/log_ratio_mean"].result(),
            stats["mismatch/log_ratio_square"].result(),
            round(float(stats["objective/sequences"].result())),
        )
        if not self._measures_subset():
            self._decide(self.measured)

    def metrics(self) -> dict[str, float]:
        """guard/* of this step: what was measured, and what was decided about it."""
        out: dict[str, float] = {}
        if self.measured is not None:
            out["guard/offset"] = self.measured.offset
            out["guard/offset_standard_error"] = self.measured.standard_error
            if self.guard is not None:
                out["guard/offset_clip_widths"] = self.guard.clip.widths(self.measured.offset)
        if self.decided and self.guard is not None:
            out["guard/active"] = float(self.guard.active)
            out["guard/applied_offset"] = self.decision.offset
        return out

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the guard's running estimate and its last decision."""
        return {"guard": self.guard.state_dict() if self.guard else None, "decision": asdict(self.decision)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self.decision = GuardDecision(**state["decision"])

    def _decide(self, measured: OffsetEstimate) -> None:
        if self.guard is None:
            return
        self.decision, self.decided = self.guard.observe(measured), True
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
        self, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout], step: int
    ) -> OffsetEstimate:
        """The exact offset on a random subset of the batch's sequences: one small forward pass."""
        population = [pick for mini in mini_batches for pick in mini.sequences()]
        seed = self.seed * SUBSET_SEED_STRIDE + step - 1
        chosen = choose_subset(len(population), self.config.guard.subset_fraction, seed)
        sample = take_sequences([population[i] for i in chosen], replicas=mini_batches[0].replicas)
        if self.config.routing_replay == "r3":
            sample = with_traces(sample, rollouts)
        learner, engine, segments = self._paired_logprobs(sample)
        return batch_offset(segments.mean(learner - engine).tolist(), population=len(population))

    def _paired_logprobs(self, sample: MicroBatches) -> tuple[torch.Tensor, torch.Tensor, Segments]:
        """(learner's log-probs [N], engine's [N], their sequences) over all trained tokens of the sample."""
        learner, engine, sequences, count = [], [], [], 0
        for batches, outputs in zip(sample, self.learner.logprobs(sample), strict=True):
            for batch, output in zip(batches, outputs, strict=True):
                index = trained_index(batch)
                # Sequences are renumbered without gaps: fillers have no trained token, and Segments
                # wants none empty.
                present, dense = torch.unique(batch.sequence_ids()[index], return_inverse=True)
                learner.append(output.logprobs[index].double())
                engine.append(batch.rollout_logprobs[index].double())
                sequences.append(dense + count)
                count += len(present)
        return torch.cat(learner), torch.cat(engine), Segments(torch.cat(sequences), count)
