"""What the log-prob probe accepts: by precision, by the run's own mismatch, or by the user's number."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from gspo_dist.weights.tolerance import ProbeTolerance
from gspo_dist.weights.verify import WeightSyncError


def judged(tolerance: ProbeTolerance, mean: float, caplog) -> str:
    """stops, warns or passes."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        try:
            tolerance.check(mean, 2 * mean, engine="engine-3", policy_version=7)
        except WeightSyncError:
            return "stops"
    return "warns" if "engine-3 and learner differ more than usual" in caplog.text else "passes"


@pytest.mark.parametrize(
    ("precision", "means", "mean", "verdict"),
    [
        # A healthy 30B mixture in bf16 (0.02) and sharp small models (0.034): 0.02 used to stop them.
        ("bf16", [], 0.034, "passes"),
        ("bf16", [], 0.06, "warns"),
        ("bf16", [], 0.49, "warns"),
        ("bf16", [], 0.51, "stops"),
        ("bf16", [0.02], 0.049, "passes"),
        ("bf16", [0.02], 0.051, "warns"),
        ("bf16", [0.02], 0.159, "warns"),
        ("bf16", [0.02], 0.161, "stops"),
        ("bf16", [0.16], 0.31, "passes"),  # random weights, sharpened logits: that is its own mismatch
        ("bf16", [0.16], 1.27, "warns"),
        ("bf16", [0.16], 1.29, "stops"),
        ("bf16", [1e-4], 0.099, "warns"),
        ("bf16", [1e-4], 0.101, "stops"),
        ("fp32", [], 9e-4, "passes"),
        ("fp32", [1e-6], 1.1e-3, "warns"),
        ("fp32", [1e-6], 0.021, "stops"),
        ("fp32", [], 0.019, "warns"),
        ("fp32", [], 0.021, "stops"),
        ("fp16", [], 0.009, "passes"),
        ("fp16", [], 0.011, "warns"),
        ("fp16", [], 0.199, "warns"),
        ("fp16", [], 0.201, "stops"),
        ("fp16", [1e-4], 0.049, "warns"),
        ("fp16", [1e-4], 0.051, "stops"),
        # A limit itself is within it. These numbers are exact in binary: 2 and 8 times 1/16.
        ("bf16", [0.0625], 0.125, "passes"),
        ("bf16", [0.0625], 0.5, "warns"),
        ("bf16", [0.02], float("nan"), "stops"),
    ],
)
def test_the_limits_follow_precision_and_the_runs_own_mismatch(precision, means, mean, verdict, caplog):
    tolerance = ProbeTolerance(precision, None)
    for earlier in means:
        tolerance.accept(earlier)
    assert judged(tolerance, mean, caplog) == verdict


def test_the_users_number_is_the_only_limit(caplog):
    tolerance = ProbeTolerance("bf16", 0.01)
    tolerance.accept(0.16)
    assert judged(tolerance, 0.0099, caplog) == "passes"
    assert judged(tolerance, 0.01, caplog) == "passes"
    assert judged(tolerance, 0.0101, caplog) == "stops"
    with pytest.raises(WeightSyncError, match=r"at most 0\.01 is rollout\.weight_sync\.probe_tolerance; "):
        tolerance.check(0.02, 0.03, engine="e", policy_version=1)


def test_the_reason_of_a_limit_is_told():
    tolerance = ProbeTolerance("bf16", None)
    with pytest.raises(
        WeightSyncError,
        match=r"^e and .* of version 0: .* 0\.6 nats \(max 1\), and at most 0\.5 can be precision; ",
    ):
        tolerance.check(0.6, 1.0, engine="e", policy_version=0)
    tolerance.accept(0.02)
    with pytest.raises(WeightSyncError, match=r"at most 0\.16 can be mismatch, which was 0\.02 in this run"):
        tolerance.check(0.6, 1.0, engine="e", policy_version=0)


def test_the_own_mismatch_is_the_median_of_the_newest_five():
    tolerance = ProbeTolerance("bf16", None)
    for mean in (9.0, 0.02, 0.03, 0.05, 0.9, 0.04):
        tolerance.accept(mean)
    assert tolerance.own == 0.04
    assert tolerance.stop_above == pytest.approx(8 * 0.04, rel=1e-12)
    assert tolerance.warn_above == pytest.approx(2 * 0.04, rel=1e-12)


def rows(shift: float = 0.0) -> dict[str, list[np.ndarray]]:
    return {"engine-0": [np.array([-1.0, -2.0 + shift])], "engine-1": [np.array([-1.0, -2.0])]}


@pytest.mark.parametrize(
    ("precision", "repeat", "changed", "passes"),
    [
        ("fp32", 0.0, 1.9e-6, True),
        ("fp32", 0.0, 2.1e-6, False),
        ("bf16", 0.0, 1.9e-4, True),
        ("bf16", 0.0, 2.1e-4, False),  # far below its mismatch with the learner, and still a wrong sync
        ("bf16", 1e-3, 3.1e-3, True),  # an engine that does not repeat itself
        ("bf16", 1e-3, 3.3e-3, False),
        ("fp16", 0.0, 3.9e-5, True),
        ("fp16", 0.0, 4.1e-5, False),
        ("fp32", 0.0, float("nan"), False),
    ],
)
def test_a_sync_of_the_weights_that_were_there_changes_nothing(precision, repeat, changed, passes, caplog):
    """The mean is over two tokens, of which one moves."""
    tolerance = ProbeTolerance(precision, None)
    if passes:
        tolerance.check_identity(rows(), rows(repeat), rows(changed))
        return
    with pytest.raises(
        WeightSyncError, match=r"^engine-0 computes another policy after a sync of the very we"
    ):
        tolerance.check_identity(rows(), rows(repeat), rows(changed))
    insisted = ProbeTolerance(precision, 0.5)
    with caplog.at_level(logging.WARNING):
        insisted.check_identity(rows(), rows(repeat), rows(changed))
    assert "another policy after a sync of the very weights" in caplog.text


def test_an_engine_that_died_on_the_way_is_not_compared():
    tolerance = ProbeTolerance("fp32", None)
    one = {"engine-1": rows()["engine-1"]}
    tolerance.check_identity(rows(), rows(), one)
    tolerance.check_identity(rows(), one, rows(0.5))


def test_what_an_engine_changed_by_exactly_its_limit_is_granted_and_told(caplog):
    """Zeros, so that the mean is the number itself: half of 4e-6 is 2e-6, of which 1e-6 is fp32's own."""
    zero = {"e": [np.zeros(2)]}
    with caplog.at_level(logging.INFO):
        ProbeTolerance("fp32", None).check_identity(zero, zero, {"e": [np.array([0.0, 2e-6])]})
    assert caplog.messages == ["e repeats itself to 1e-06 nats, before and after a sync"]
