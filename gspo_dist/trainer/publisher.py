"""The checked weight sync: every transfer is verified (version, checksums), and on a schedule probed by log-probs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from gspo_dist.config import WeightSyncConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.packing import from_sequences, unpack
from gspo_dist.rollout.pool import RolloutPool
from gspo_dist.weights.verify import check_probe, verify_receipt

PROBE_SEQUENCES = 4
PROBE_TOKENS = 512
"""Of each completion: vLLM 0.30 computes all prompt log-probs of a request at once, so a long one takes gigabytes."""
ProbeSequence = tuple[np.ndarray, int]
"""Token ids of prompt and completion, and where the completion starts. Only completions are compared: what a policy
was never trained to say (a prompt) has log-probs so low that bf16 noise alone moves them by tenths of a nat."""


class WeightSync:
    """Publishes the learner's weights to every engine; a failed check stops the run with the tensor's name."""

    def __init__(
        self,
        config: WeightSyncConfig,
        learner: LearnerGroup,
        pool: RolloutPool,
        ranks: int,
        max_model_len: int,
        *,
        colocated: bool = False,
    ) -> None:
        """config: its transport is resolved (shm or nccl). colocated: the engines come to a publication with their
        weights awake and their KV cache asleep."""
        self.config = config
        self.learner = learner
        self.pool = pool
        self.ranks = ranks
        self.max_model_len = max_model_len
        self.colocated = colocated
        self.published = 0
        self.probed = False

    def publish(self, probe: Sequence[ProbeSequence]) -> dict[str, float]:
        """Sends the current weights and checks them. `probe`: sequences for the log-prob probe, when it is due.

        Returns sync/* metrics. Raises WeightSyncError naming the tensor and the engine, or a timeout naming a process.
        """
        timeout = self.config.timeout_s
        version = self.learner.policy_version
        start = time.perf_counter()
        self.pool.start_weight_update(timeout)
        started = time.perf_counter()
        sent = self.learner.send_weights(self.config, self.pool.engines)
        delivered = time.perf_counter()
        receipts = self.pool.finish_weight_update(version, timeout)
        if self.config.check:
            for engine, receipt in receipts.items():
                verify_receipt(sent.checksums, receipt, version, engine=engine)
        seconds = time.perf_counter() - start
        checking = sent.seconds_checking + max(r.seconds_checking for r in receipts.values())
        metrics = {
            "sync/bytes": float(sent.bytes),
            "sync/check_fraction": checking / seconds,
            "time/sync/start_s": started - start,
            "time/sync/send_s": delivered - started,
            "time/sync/finish_s": start + seconds - delivered,
            "sync/gib_per_s": sent.bytes / seconds / 2**30,
        }
        every = self.config.probe_every
        due = not self.probed or bool(every and self.published % every == 0)
        kept = self._probed(probe) if due else []
        ours = self._learner_scores(kept) if kept else []
        if (
            self.colocated
        ):  # nothing of the learner runs before the next rollouts: its GPU memory is the KV cache's
            self.learner.empty_cache()
            self.pool.wake_up()
        if kept:
            metrics |= self._compare(kept, ours)
        self.probed = self.probed or due
        self.published += 1
        return metrics

    def _probed(self, sequences: Sequence[ProbeSequence]) -> list[ProbeSequence]:
        """The sequences of the probe, cut to what it compares."""
        # An engine scores a sequence by sampling one token after it, which must fit the context too.
        limit = self.max_model_len - 1
        cut = [(np.asarray(tokens)[: min(limit, start + PROBE_TOKENS)], start) for tokens, start in sequences]
        return [(tokens, start) for tokens, start in cut if len(tokens) > max(1, start)][:PROBE_SEQUENCES]

    def _learner_scores(self, kept: Sequence[ProbeSequence]) -> list[np.ndarray]:
        """The learner's log-probs of the completions."""
        mini = from_sequences(kept, self.ranks)
        learner: dict[int, np.ndarray] = {}
        for rank, outputs in zip(mini.micro_batches, self.learner.logprobs(mini), strict=True):
            for batch, output in zip(rank, outputs, strict=True):
                learner |= unpack(batch, output.logprobs)
        return [learner[i] for i in range(len(kept))]

    def _compare(self, kept: Sequence[ProbeSequence], ours: Sequence[np.ndarray]) -> dict[str, float]:
        """Scores the same completions with the engines: proves what they compute, not what arrived."""
        worst_mean, worst_max = 0.0, 0.0
        for engine, scores in self.pool.logprobs_of(
            [tokens for tokens, _ in kept], self.config.timeout_s
        ).items():
            theirs = [score[max(1, start) - 1 :] for score, (_, start) in zip(scores, kept, strict=True)]
            mean, largest = check_probe(
                theirs,
                ours,
                self.config.probe_tolerance,
                engine=engine,
                policy_version=self.learner.policy_version,
            )
            worst_mean, worst_max = max(worst_mean, mean), max(worst_max, largest)
        return {"sync/probe_mean_abs": worst_mean, "sync/probe_max_abs": worst_max}
