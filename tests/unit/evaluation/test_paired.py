"""Two results compared: numbers by hand, and by another library's own test."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from gspo_dist.evaluation.paired import FLIPS, compare, read_results, sign_flip, table


def result(shares: dict[str, list[int]], suite: str = "aime24") -> dict:
    samples = [{"problem": p, "correct": bool(c)} for p, own in shares.items() for c in own]
    return {"suite": suite, "samples": samples}


A = {"p0": [1, 0], "p1": [0, 0], "p2": [1, 1], "p3": [0, 1], "p4": [0, 0]}
B = {"p0": [1, 1], "p1": [1, 0], "p2": [1, 1], "p3": [0, 0], "p4": [1, 1], "p9": [1, 1]}


def test_the_difference_is_paired_by_problem():
    found = compare(result(A), result(B))
    differences = np.array([0.5, 0.5, 0.0, -0.5, 1.0])
    assert (found.problems, found.better, found.worse) == (5, 3, 1)
    assert found.first == pytest.approx(0.4, rel=1e-12)
    assert found.second == pytest.approx(0.7, rel=1e-12)
    assert found.difference == pytest.approx(0.3, rel=1e-12)
    a = np.array([0.5, 0.0, 1.0, 0.5, 0.0])
    oracle = stats.ttest_rel(a + differences, a)
    assert found.p_t == pytest.approx(oracle.pvalue, rel=1e-10)
    interval = oracle.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    # Signs of .5 .5 .5 1: |sum| >= 1.5 for 1+.5*(at least two more +) and their mirrors: 4 of 8, twice.
    assert found.p_permutation == 8 / 16
    assert "better 3, worse 1" in table([found])
    assert "+0.3000" in table([found])


def test_signs_by_hand():
    assert sign_flip(np.array([1.0, 1.0, 1.0])) == 2 / 8
    assert sign_flip(np.array([0.0, 0.0])) == 1.0
    assert sign_flip(np.array([1.0, -1.0])) == 1.0


def test_many_signs_are_drawn_and_never_give_p_0():
    assert sign_flip(np.ones(40)) == pytest.approx(1 / (FLIPS + 1), rel=1e-9)
    mixed = np.array([1.0] * 13 + [-1.0] * 7)
    assert sign_flip(mixed) == pytest.approx(2 * stats.binom.cdf(7, 20, 0.5), abs=0.005)


def test_results_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="of one suite are compared: got aime24 and gsm8k"):
        compare(result(A), result(A, "gsm8k"))
    with pytest.raises(ValueError, match="share at least two problems: got 0"):
        compare(result(A), result({"x": [1]}))
    with pytest.raises(ValueError, match=r"must be a result\.json"):
        read_results(tmp_path)
    assert math.isnan(compare(result(A), result(A)).p_t)


def test_the_last_result_of_a_folder_counts(tmp_path):
    for step, shares in ((1, A), (2, B)):
        folder = tmp_path / f"step_{step:06d}/aime24"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result(shares)))
    assert read_results(tmp_path)["aime24"] == result(B)
    assert read_results(tmp_path / "step_000001/aime24/result.json")["aime24"] == result(A)
