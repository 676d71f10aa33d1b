"""The guard over engine log-probs: measures their offset in the first mini-batch and decides what a step
does about it.

With old log-probs from the engine, the mean log ratio of the first mini-batch is what the mismatch engine /
learner puts on every sequence ratio: the policy has not moved yet (objectives/offset.py has the theory). The
guard warns, recentres later mini-batches, or asks for recomputation, as `objective.guard` says.

Only fresh tokens say that: those which the weights that the learner starts the step from have sampled. In a
batch without any, the guard takes the newest probe of a publication (publisher.py), where both sides have one
version too. What older tokens say is staleness (objectives/staleness.py), and never reaches the guard.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from gspo_dist.config import ObjectiveConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.learners.loss import LossSpec, fresh_part, lags_of, trained_index
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
from gspo_dist.objectives.staleness import OWN_MEAN_FROM
from gspo_dist.packing import MicroBatches, MiniBatch, with_traces
from gspo_dist.probes import take_sequences
from gspo_dist.trainer.remedies import StalenessRemedies
from gspo_dist.types import PackedBatch, Rollout

log = logging.getLogger(__name__)

SUBSET_SEED_STRIDE = 1_000_003
"""A prime larger than any number of steps: seed * stride + index gives each step of each seed a subset
of its own.
"""


class OffsetGuard:
    """Measures once per step, decides, and hands each mini-batch its loss. Idle where old
    log-probs are recomputed.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        objective: Objective,
        learner: LearnerGroup,
        seed: int,
        token_budget: int,
        *,
        exact: bool = False,
    ) -> None:
        """token_budget: most tokens of one forward pass (learner.forward_budget).

        exact: the run stops at the first fresh token on which engine and learner differ.
        """
        self.config = config
        self.exact = exact
        self.objective = objective
        self.learner = learner
        self.seed = seed
        self.token_budget = token_budget
        self.guard = make_guard(config.guard, objective.clip)
        self.remedies = StalenessRemedies(config, objective)
        """What the step does about tokens of older policies."""
        self.recomputed = False
        """Whether the step's old log-probs are the learner's own."""
        self.decision = GuardDecision("none", 0.0, False, "no measurement yet")
        self.measured: OffsetEstimate | None = None
        """The offset of this step's first mini-batch, or of the newest probe."""
        self.from_probe = False
        """Whether it is the probe's."""
        self.policy_version: int | None = None
        """The learner's at the start of the step."""
        self.decided = False
        """Whether this step's measurement reached the guard."""

    @property
    def wants_recompute(self) -> bool:
        """Whether the last decision is to recompute old log-probs until the offset is small again."""
        return self.decision.action == "recompute"

    def begin_step(self, mini_batches: Sequence[MiniBatch], rollouts: Sequence[Rollout], step: int) -> None:
        """Forgets the last step's measurement. The estimator `subset` measures now, by forward
        passes over a few sequences.
        """
        self.measured, self.decided, self.from_probe = None, False, False
        self.policy_version = self.learner.policy_version
        self.remedies.begin_step(mini_batches, self.policy_version)
        if self.config.old_logprobs != "recompute" and self._measures_subset():
            subset = self._subset_offset(mini_batches, rollouts, step)
            if subset is not None:
                self._decide(subset)

    def loss_spec(self, mini: MiniBatch, index: int, *, recomputed: bool) -> LossSpec:
        """The loss of mini-batch `index` of this step; recentred while the guard acts by recentring.

        recomputed: the step's old log-probs are the learner's own, so there is no offset to take out.
        """
        recentring = not recomputed and self.decision.action == "recentre"
        smallest = min(batch.num_sequences for batch in mini.batches())
        fresh = all(lags_of(batch, self.policy_version) is None for batch in mini.batches())
        # The estimator `batch` does not know this step's offset before its first forward pass, so the first
        # mini-batch is recentred by its own mean, where it has sequences enough. Older tokens would put the
        # policy's own movement into that mean.
        own_mean = (
            recentring
            and index == 0
            and fresh
            and self.config.guard.estimator == "batch"
            and smallest >= OWN_MEAN_FROM
        )
        self.recomputed = recomputed
        return LossSpec(
            self.remedies.widened(recomputed=recomputed),
            mini.denominators,
            self.config.correction,
            offset=self.decision.offset if recentring and not own_mean else 0.0,
            lag_offsets=self.remedies.lag_offsets(index, recomputed=recomputed),
            own_mean=own_mean,
            measure_mismatch=recomputed or index == 0,
            policy_version=self.policy_version,
            exact=self.exact,
        )

    def observe(self, stats: Mapping[str, Stat], index: int, probe: OffsetEstimate | None = None) -> None:
        """Takes in a mini-batch's statistics. Only the first one's offset is mismatch: after it the
        policy has moved.

        probe: of the publication that this step started from; None where that was not probed. It stands in
        for a mini-batch without a fresh token.
        """
        if index != 0:
            return
        mean, fresh = stats.get("mismatch/log_ratio_mean"), None
        if mean is not None:
            square, sequences = stats["mismatch/log_ratio_square"], round(float(mean.weight))
            self.measured = offset_from_moments(mean.result(), square.result(), sequences)
            fresh = self.measured.offset
        elif probe is not None:
            self.measured, self.from_probe = probe, True
        if not self.recomputed:
            self.remedies.observe(stats, fresh)
        if self.measured is not None and not (self._measures_subset() and self.decided):
            self._decide(self.measured)

    def metrics(self) -> dict[str, float]:
        """guard/* of this step: what was measured, and what was decided about it."""
        out: dict[str, float] = {}
        if self.measured is not None:
            out["guard/offset"] = self.measured.offset
            out["guard/offset_standard_error"] = self.measured.standard_error
            out["guard/from_probe"] = float(self.from_probe)
            if self.guard is not None:
                out["guard/offset_clip_widths"] = self.guard.clip.widths(self.measured.offset)
        if self.decided and self.guard is not None:
            out["guard/active"] = float(self.guard.active)
            out["guard/applied_offset"] = self.decision.offset
        return out | self.remedies.metrics(recomputed=self.recomputed)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the guard's running estimate and its last decision."""
        return {
            "guard": self.guard.state_dict() if self.guard else None,
            "decision": asdict(self.decision),
            "remedies": self.remedies.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self.decision = GuardDecision(**state["decision"])
        if "remedies" in state:  # checkpoints from before them have none
            self.remedies.load_state_dict(state["remedies"])

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
    ) -> OffsetEstimate | None:
        """The exact offset on a random subset of the sequences with fresh tokens, in passes within the
        budget.

        None where there is no such sequence.
        """
        population = [pick for mini in mini_batches for pick in mini.sequences() if self._has_fresh(*pick)]
        if not population:
            return None
        seed = self.seed * SUBSET_SEED_STRIDE + step - 1
        chosen = choose_subset(len(population), self.config.guard.subset_fraction, seed)
        sample = take_sequences(
            [population[i] for i in chosen],
            replicas=mini_batches[0].replicas,
            token_budget=self.token_budget,
        )
        if self.config.routing_replay == "r3":
            sample = with_traces(sample, rollouts)
        learner, engine, segments = self._paired_logprobs(sample)
        return batch_offset(segments.mean(learner - engine).tolist(), population=len(population))

    def _paired_logprobs(self, sample: MicroBatches) -> tuple[torch.Tensor, torch.Tensor, Segments]:
        """(learner's log-probs [N], engine's [N], their sequences) over all fresh tokens of the sample."""
        learner, engine, sequences, count = [], [], [], 0
        for batches, outputs in zip(sample, self.learner.logprobs(sample), strict=True):
            for batch, output in zip(batches, outputs, strict=True):
                index = trained_index(batch)
                # Renumbered without gaps: fillers have no trained token, and Segments wants none empty.
                keep, dense, present = fresh_part(batch, lags_of(batch, self.policy_version), index)
                learner.append(output.logprobs[index][keep].double())
                engine.append(batch.rollout_logprobs[index][keep].double())
                sequences.append(dense + count)
                count += present
        return torch.cat(learner), torch.cat(engine), Segments(torch.cat(sequences), count)

    def _has_fresh(self, batch: PackedBatch, sequence: int) -> bool:
        """Whether the policy that the step starts from sampled a trained token of the sequence."""
        rows, lags = batch.rows(sequence), lags_of(batch, self.policy_version)
        return lags is None or bool((batch.loss_mask[rows] & (lags[rows] == 0)).any())
