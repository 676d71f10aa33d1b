"""Batch diagnostics on numbers done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gspo_dist.objectives.diagnostics import advantage_statistics, length_by_outcome, ratio_quantiles


def test_diagnostics_on_numbers_done_by_hand():
    stats = advantage_statistics(np.array([1.0, -1.0, 0.0, 2.0]))
    assert stats["advantage/mean"] == 0.5
    assert stats["advantage/std"] == pytest.approx(math.sqrt(1.25))
    assert (stats["advantage/positive_fraction"], stats["advantage/negative_fraction"]) == (0.5, 0.25)
    assert (stats["advantage/zero_fraction"], stats["advantage/min"], stats["advantage/max"]) == (
        0.25,
        -1.0,
        2.0,
    )
    q = ratio_quantiles(np.arange(101.0), (0.0, 0.1, 0.5, 1.0))
    assert q == {"ratio/q0": 0.0, "ratio/q10": 10.0, "ratio/q50": 50.0, "ratio/q100": 100.0}
    lengths = length_by_outcome(np.array([10, 20, 60]), np.array([True, True, False]))
    assert lengths["rollout/length_correct_tokens"] == 15
    assert lengths["rollout/length_wrong_tokens"] == 60
    assert lengths["rollout/correct_fraction"] == pytest.approx(2 / 3)
    assert math.isnan(length_by_outcome(np.array([3]), np.array([True]))["rollout/length_wrong_tokens"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantage_statistics(np.array([])), "advantages"),
        (lambda: ratio_quantiles(np.ones(3), (1.5,)), "quantiles"),
        (lambda: length_by_outcome(np.ones(2), np.array([1, 0])), "correct must be bool"),
    ],
)
def test_bad_diagnostic_inputs_name_the_field(call, message):
    with pytest.raises(ValueError, match=message):
        call()
