"""Laws of the verdicts on a sync."""

import numpy as np
import pytest

from gspo_dist.rollout.engine import SyncReceipt
from gspo_dist.weights.verify import WeightSyncError, check_probe, probe_difference, verify_receipt

SENT = {"a": 1, "b": 2, "c": 3}


def receipt(checksums, version=5):
    return SyncReceipt(version, checksums, len(checksums), 0, 0.0)


def test_a_true_receipt_passes():
    verify_receipt(SENT, receipt(dict(reversed(SENT.items()))), 5)


@pytest.mark.parametrize(
    ("checksums", "version", "message"),
    [
        ({"a": 1, "b": 9, "c": 8}, 5, "other bytes for b"),
        ({"a": 1, "c": 3}, 5, r"did not receive b \(2 of 3"),
        ({**SENT, "d": 4}, 5, "received d, which was not sent"),
        (SENT, 4, "reports policy version 4 after a sync of version 5"),
    ],
)
def test_the_first_fault_is_named(checksums, version, message):
    with pytest.raises(WeightSyncError, match=message):
        verify_receipt(SENT, receipt(checksums, version), 5, engine="engine-1")


def test_probe_difference_counts_tokens_not_sequences():
    engine = [np.array([-1.0, -2.0, -3.0]), np.array([-1.0])]
    learner = [np.array([-1.0, -2.0, -3.0]), np.array([-1.4])]
    assert probe_difference(engine, learner) == (pytest.approx(0.1), pytest.approx(0.4))


def test_probe_raises_above_its_tolerance_with_the_numbers():
    engine, learner = [np.array([-1.0, -2.0])], [np.array([-1.0, -2.1])]
    assert check_probe(engine, learner, 0.06) == (pytest.approx(0.05), pytest.approx(0.1))
    with pytest.raises(WeightSyncError, match=r"0\.05 nats \(max 0\.1\).*probe_tolerance is 0\.04"):
        check_probe(engine, learner, 0.04)


def test_nan_never_passes():
    with pytest.raises(WeightSyncError):
        check_probe([np.array([np.nan])], [np.array([-1.0])], 1e9)


@pytest.mark.parametrize(
    ("engine", "learner"),
    [([], []), ([np.zeros(2)], []), ([np.zeros(2)], [np.zeros(3)]), ([np.zeros(0)], [np.zeros(0)])],
)
def test_probes_that_compare_nothing_are_refused(engine, learner):
    with pytest.raises(ValueError, match="probe"):
        probe_difference(engine, learner)


def test_a_probe_at_its_tolerance_passes():
    assert check_probe([np.array([0.0])], [np.array([-0.5])], 0.5) == (0.5, 0.5)


def test_lengths_that_differ_are_said_for_each_side():
    with pytest.raises(
        ValueError, match="probe sequence 1 has 2 log-probs of the engine and 3 of the learner"
    ):
        probe_difference([np.zeros(1), np.zeros(2)], [np.zeros(1), np.zeros(3)])
    with pytest.raises(ValueError, match="at least one: got 2 and 1"):
        probe_difference([np.zeros(1)] * 2, [np.zeros(1)])


def test_float32_log_probs_are_compared_in_float64():
    """0.1 and 1e9 in float32: in float32 the difference would be 1e9 again."""
    a, b = np.array([0.1], dtype=np.float32), np.array([1e9], dtype=np.float32)
    assert probe_difference([a], [b])[1] == 1e9 - float(a[0])


def test_a_probe_says_its_version_and_its_engine():
    with pytest.raises(WeightSyncError, match="engine-2 and learner disagree after the sync of version 7"):
        check_probe([np.zeros(1)], [np.ones(1)], 0.1, engine="engine-2", policy_version=7)
