"""The checked weight sync: every transfer is verified (version, checksums), and on a schedule
probed by log-probs.

weights/__init__.py has the map of one publication; this module is its driver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np

from gspo_dist.config import WeightSyncConfig
from gspo_dist.config.rollout import PROBE_SEQUENCES, PROBE_TOKENS
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.objectives.offset import OffsetEstimate, batch_offset
from gspo_dist.packing import unpack
from gspo_dist.probes import from_sequences
from gspo_dist.rollout.pool import RolloutPool
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.types import Completion, Prompt
from gspo_dist.weights.tolerance import ProbeTolerance
from gspo_dist.weights.verify import probe_difference, verify_receipt

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Of a publication whose engines die in its middle: it begins again with those that live."""

ProbeSequence = tuple[np.ndarray, int]
"""Token ids of prompt and completion, and where the completion starts. Only completions are compared: what
a policy was never trained to say (a prompt) has log-probs so low that bf16 noise alone moves them by tenths
of a nat.
"""


def probe_sequences(sampled: Sequence[tuple[Prompt, Completion]]) -> list[ProbeSequence]:
    """Sampled completions as the log-prob probe of a publication takes them.

    Of an episode it takes what the policy said first. Example: a prompt of 2 and a completion of 6 tokens of
    which the third and fourth were sampled give 6 tokens, of which the last 2 are compared.
    """
    found = []
    for prompt, completion in sampled:
        start = int(completion.loss_mask.argmax()) if completion.loss_mask.any() else 0
        rest = completion.loss_mask[start:]
        end = len(completion) if rest.all() else start + int(rest.argmin())
        ids = np.concatenate([prompt.token_ids, completion.token_ids[:end]])
        found.append((ids, len(prompt.token_ids) + start))
    return found


def learner_logprobs(
    learner: LearnerGroup, sequences: Sequence[ProbeSequence], *, replicas: int, token_budget: int
) -> list[np.ndarray]:
    """The learner's log-probs of the tokens that are compared, one array per sequence."""
    micro_batches = from_sequences(sequences, replicas=replicas, token_budget=token_budget)
    found: dict[int, np.ndarray] = {}
    for batches, outputs in zip(micro_batches, learner.logprobs(micro_batches), strict=True):
        for batch, output in zip(batches, outputs, strict=True):
            found |= unpack(batch, output.logprobs)
    return [found[i] for i in range(len(sequences))]


class WeightPublisher:
    """Publishes the learner's weights to every engine. A failed check stops the run and names the tensor."""

    def __init__(
        self,
        config: WeightSyncConfig,
        learner: LearnerGroup,
        pool: RolloutPool,
        *,
        replicas: int,
        token_budget: int,
        max_model_len: int,
        tolerance: ProbeTolerance,
        begins_equal: bool = False,
        shared: SharedGpus | None = None,
        probe_always: bool = False,
    ) -> None:
        """config: its transport may still be auto, which is resolved where the engines are met.
        replicas, token_budget: of the learner's forward passes, of which a probe takes one.
        begins_equal: policy version 0 has the very weights that the engines loaded, so that its publication
        must change nothing.
        shared: gives the GPUs to the publication, and then to the engines. None: they have GPUs of their own.
        """
        self.config = config
        self.learner = learner
        self.pool = pool
        self.replicas = replicas
        self.token_budget = token_budget
        self.max_model_len = max_model_len
        self.tolerance = tolerance
        self.begins_equal = begins_equal
        self.shared = shared or SharedGpus(learner, pool, colocated=False)
        self.probe_always = probe_always
        self.published = 0
        """Publications of the whole run, over its interruptions."""
        self.probed = False
        """Whether this process has probed: the first publication always is, whatever the schedule says."""
        self.probed_offset: OffsetEstimate | None = None
        """Mean log ratio, learner minus engine, of the newest publication's probe. None where it had none.

        Its sequences are older than the weights. So it says how far apart the two compute, and is not the -KL
        that fresh samples have on average."""

    def publish(self, probe: Sequence[ProbeSequence]) -> dict[str, float]:
        """Sends the current weights to all engines, checks what arrived, and probes when it is due.

        probe: sequences for the log-prob probe. Returns sync/* and time/sync/*. Raises WeightSyncError
        that names the tensor and the engine, or TimeoutError that names a process. The learner's weights
        are only read.
        """
        every = self.config.probe_every
        due = not self.probed or bool(every and (self.probe_always or self.published % every == 0))
        kept = self._cut(probe) if due else []
        identity = self.begins_equal and not self.probed and self.learner.policy_version == 0
        before = [self._theirs(kept) for _ in range(2)] if identity and kept else []
        self.shared.to_publication()
        metrics = self._transfer()
        ours = self._ours(kept) if kept else []
        self.probed_offset = None
        self.shared.to_engines()
        if kept:
            metrics |= self._compare(kept, ours, before)
        self.probed = self.probed or due
        self.published += 1
        return metrics

    def _transfer(self) -> dict[str, float]:
        """Streams the weights and verifies every engine's receipt."""
        timeout, version = self.config.timeout_s, self.learner.policy_version
        start = time.perf_counter()
        for left in reversed(range(ATTEMPTS)):
            self.pool.start_weight_update(timeout)
            started = time.perf_counter()
            try:
                sent = self.learner.send_weights(self.config, self.pool.engines)
                break
            except Exception as error:
                if not left or not self.pool.abandon_update():
                    raise
                log.warning("publication of version %d begins again, an engine died: %s", version, error)
        delivered = time.perf_counter()
        receipts = self.pool.finish_weight_update(version, timeout)
        if self.config.check:
            for engine, receipt in receipts.items():
                verify_receipt(sent.checksums, receipt, version, engine=engine)
        finished = time.perf_counter()
        # Engines check side by side, the sender before them: the slowest engine and the sender are
        # what it costs.
        checking = sent.seconds_checking + max(r.seconds_checking for r in receipts.values())
        return {
            "sync/bytes": float(sent.bytes),
            "sync/check_fraction": checking / (finished - start),
            "sync/gib_per_s": sent.bytes / (finished - start) / 2**30,
            "time/sync/start_s": started - start,
            "time/sync/send_s": delivered - started,
            "time/sync/finish_s": finished - delivered,
        }

    def _ours(self, kept: Sequence[ProbeSequence]) -> list[np.ndarray]:
        """The learner's log-probs of the probe."""
        return learner_logprobs(self.learner, kept, replicas=self.replicas, token_budget=self.token_budget)

    def _cut(self, sequences: Sequence[ProbeSequence]) -> list[ProbeSequence]:
        """The probe, cut to what it compares; sequences without a completion token are left out."""
        # An engine gives a sequence's log-probs by sampling one token after it, which must fit
        # the context too.
        limit = self.max_model_len - 1
        cut = [(np.asarray(tokens)[: min(limit, start + PROBE_TOKENS)], start) for tokens, start in sequences]
        return [(tokens, start) for tokens, start in cut if len(tokens) > max(1, start)][:PROBE_SEQUENCES]

    def _theirs(self, kept: Sequence[ProbeSequence]) -> dict[str, list[np.ndarray]]:
        """The engines' log-probs of all tokens of the probe but the first of each sequence."""
        return self.pool.logprobs_of([tokens for tokens, _ in kept], self.config.timeout_s)

    def _compare(
        self,
        kept: Sequence[ProbeSequence],
        ours: Sequence[np.ndarray],
        before: Sequence[Mapping[str, list[np.ndarray]]],
    ) -> dict[str, float]:
        """The engines' log-probs of the same completions: proves what they compute, not only what arrived.

        before: what the engines said of them twice before a publication that must change nothing; else empty.
        """
        if before:
            # No sync had a part in it: this is the run's own mismatch.
            self._judge(kept, ours, before[0])
        after = self._theirs(kept)
        if before:
            self.tolerance.check_identity(before[0], before[1], after)
        stop_above = self.tolerance.stop_above
        mean, largest = self._judge(kept, ours, after)
        return {
            "sync/probe_mean_abs": mean,
            "sync/probe_max_abs": largest,
            "sync/probe_stops_above": stop_above,
        }

    def _judge(
        self,
        kept: Sequence[ProbeSequence],
        ours: Sequence[np.ndarray],
        answers: Mapping[str, list[np.ndarray]],
    ) -> tuple[float, float]:
        """Mean and largest |difference| of the worst engine. WeightSyncError beyond what can be mismatch."""
        means, largest, offsets = [], [], []
        for engine, logprobs in answers.items():
            # Entry i of an engine's answer speaks of token i + 1, because nothing predicts the first token.
            theirs = [row[max(1, start) - 1 :] for row, (_, start) in zip(logprobs, kept, strict=True)]
            mean, most = probe_difference(theirs, ours)
            self.tolerance.check(mean, most, engine=engine, policy_version=self.learner.policy_version)
            means.append(mean)
            largest.append(most)
            offsets += [float(np.mean(o - t)) for o, t in zip(ours, theirs, strict=True)]
        self.probed_offset = batch_offset(offsets)
        self.tolerance.accept(max(means))
        return max(means), max(largest)
