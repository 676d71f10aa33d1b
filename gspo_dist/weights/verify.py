"""Verdicts on a weight sync: did every engine get what was sent, and does it compute what
the learner computes?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class WeightSyncError(RuntimeError):
    """A weight sync that cannot be trusted; training must not go on."""


class Receipt(Protocol):
    """What `verify_receipt` reads of an engine's `SyncReceipt`."""

    @property
    def policy_version(self) -> int:
        """The version that the engine now samples under."""
        ...

    @property
    def checksums(self) -> Mapping[str, int]:
        """Checksum of every tensor as it arrived, by name."""
        ...


def verify_receipt(
    sent: Mapping[str, int], receipt: Receipt, expected_version: int, *, engine: str = "engine"
) -> None:
    """Compares an engine's receipt with what was sent.

    WeightSyncError, with the engine's name: another version, or the first tensor that is missing,
    different or extra.
    """
    if receipt.policy_version != expected_version:
        raise WeightSyncError(
            f"{engine} reports policy version {receipt.policy_version} after a sync of version "
            f"{expected_version}; an update was lost or applied twice: restart the engine"
        )
    got = receipt.checksums
    for name, checksum in sent.items():
        if name not in got:
            raise WeightSyncError(
                f"{engine} did not receive {name} ({len(got)} of {len(sent)} tensors arrived) in version "
                f"{expected_version}; see the engine's log"
            )
        if got[name] != checksum:
            raise WeightSyncError(
                f"{engine} received other bytes for {name} in version {expected_version}: checksum "
                f"{got[name]:#018x}, sent {checksum:#018x}; check the host's memory and the transport "
                "(rollout.weight_sync.transport)"
            )
    extra = [name for name in got if name not in sent]
    if extra:
        raise WeightSyncError(
            f"{engine} received {extra[0]}, which was not sent in version {expected_version} "
            f"({len(extra)} such)"
        )


def probe_difference(
    engine_logprobs: Sequence[np.ndarray], learner_logprobs: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Mean and largest |engine - learner| over all tokens, in nats.

    Sequences pair up: engine_logprobs[i] and learner_logprobs[i] are [n_i] log-probs of the same tokens. The
    mean is over tokens, so a long sequence counts for more. ValueError: the lengths differ, or there is
    nothing to compare.
    """
    if len(engine_logprobs) != len(learner_logprobs) or not engine_logprobs:
        raise ValueError(
            f"a probe compares equally many sequences, at least one: got {len(engine_logprobs)} and "
            f"{len(learner_logprobs)}"
        )
    gaps = []
    for i, (a, b) in enumerate(zip(engine_logprobs, learner_logprobs, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"probe sequence {i} has {len(a)} log-probs of the engine and {len(b)} of the learner"
            )
        gaps.append(np.abs(np.subtract(a, b, dtype=np.float64)))
    gap = np.concatenate(gaps)
    if not gap.size:
        raise ValueError("a probe needs at least one token: every sequence was empty")
    return float(gap.mean()), float(gap.max())


def check_probe(
    engine_logprobs: Sequence[np.ndarray],
    learner_logprobs: Sequence[np.ndarray],
    tolerance: float,
    *,
    engine: str = "engine",
    policy_version: int = -1,
) -> tuple[float, float]:
    """`probe_difference`; raises `WeightSyncError` when the mean passes `tolerance` (nats) or is nan."""
    mean, largest = probe_difference(engine_logprobs, learner_logprobs)
    if not mean <= tolerance:  # also refuses nan
        raise WeightSyncError(
            f"{engine} and learner disagree after the sync of version {policy_version}: mean |difference| of "
            f"log-probs {mean:.3g} nats (max {largest:.3g}), rollout.weight_sync.probe_tolerance is "
            f"{tolerance:.3g}; the engine computes another policy than the learner although its bytes "
            "may have arrived: check that precision and temperature are the same on both sides, or raise the "
            "tolerance if the precision explains it"
        )
    return mean, largest
