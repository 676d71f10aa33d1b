"""Estimates, paired tests and collapses against numbers computed by hand."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest

from gspo_dist.studies.analysis import band, collapse_step, estimate, final_accuracy, load_runs, paired


def test_estimate_is_students_interval():
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    e = estimate([1.0, 2.0, 3.0])
    assert (e.mean, e.n) == (2.0, 3)
    assert e.half_width == pytest.approx(2.484138, abs=1e-6)
    assert e.text("{:+.1f}") == "+2.0 ± 2.5"


def test_estimates_of_one_and_of_no_value_claim_no_interval():
    one, none = estimate([0.25, math.nan]), estimate([math.inf])
    assert (one.mean, one.half_width, one.n, one.text("{:.2f}")) == (0.25, math.inf, 1, "0.25")
    assert (none.n, none.text()) == (0, "-")


def test_paired_differences_cancel_what_seeds_share(make_run):
    """Differences .1, .1, .13: t = .11 / (.0173205 / sqrt 3) = 11, two-sided p = 0.008163 with 2 degrees."""
    runs = [make_run("a", s, [v]) for s, v in enumerate((0.3, 0.6, 0.93))]
    runs += [make_run("b", s, [v]) for s, v in enumerate((0.2, 0.5, 0.8))]
    test = paired(runs, "a", "b", final_accuracy)
    assert test.difference.mean == pytest.approx(0.11)
    assert test.p == pytest.approx(0.00816327, abs=1e-6)
    assert test.significant
    assert test.text(100, " points") == "+11.0 ± 4.3 points (p = 0.0082)"


def test_equal_differences_need_no_spread(make_run):
    """The same difference in every seed: certain where it is not zero, no difference where it is."""
    base = [make_run("b", s, [0.5]) for s in range(2)]
    higher = [make_run("a", s, [0.75]) for s in range(2)]
    assert paired(higher + base, "a", "b", final_accuracy).p == 0.0
    assert paired(base, "b", "b", final_accuracy).p == 1.0


def test_two_seeds_are_enough_for_a_test_and_none_give_no_text(make_run):
    runs = [make_run(arm, s, [0.5 + s / 10]) for arm in ("a", "b") for s in range(2)]
    assert paired(runs, "a", "b", final_accuracy).testable
    nothing = paired(runs, "a", "c", final_accuracy)
    assert (nothing.testable, nothing.text()) == (False, "-")


def test_a_seed_without_a_finite_value_pairs_with_nothing(make_run):
    runs = [
        make_run("a", 0, [math.nan]),
        make_run("b", 0, [0.5]),
        make_run("a", 1, [0.7]),
        make_run("b", 1, [0.5]),
    ]
    test = paired(runs, "a", "b", final_accuracy)
    assert (test.difference.n, test.testable) == (1, False)
    assert test.text(100) == "+20.0 (one seed)"


@pytest.mark.parametrize(
    ("reward", "status", "step"),
    [
        ([0.5] * 20, "done", None),
        ([0.5] * 10 + [0.1] * 10, "done", 13),
        ([0.5] * 10 + [0.1] * 6 + [0.5] * 8, "done", None),
        ([0.5] * 5 + [0.1] * 4, "done", None),
        ([0.5] * 5 + [0.1] * 5, "done", 8),
        ([0.5] * 10 + [0.3] * 10, "done", None),
        ([0.9] + [0.1] * 19, "done", 5),
        ([0.5] * 4, "diverged", 3),
        ([], "diverged", 0),
    ],
)
def test_collapse_by_the_stated_rule(make_run, reward, status, step):
    assert collapse_step(make_run("a", 0, [0.5] * len(reward), reward, status)) == step


def test_a_band_is_mean_and_standard_error_where_every_seed_has_a_value(make_run):
    """0.2 and 0.6 at step 0: mean 0.4, s = 0.282843, error 0.2. Step 2 has one seed and is left out."""
    runs = [make_run("a", 0, [0.2, 0.5]), make_run("a", 1, [0.6, 0.5, 0.9])]
    steps, mean, error = band(runs, "eval/heldout/accuracy")
    assert steps.tolist() == [0, 1]
    assert np.allclose(mean, [0.4, 0.5], atol=1e-12)
    assert np.allclose(error, [0.2, 0.0], atol=1e-12)
    assert len(band(runs, "no/such/key")[0]) == 0


def test_runs_are_read_with_their_ends(written_study):
    runs = load_runs(written_study)
    assert [(r.arm, r.seed, r.status, r.seconds) for r in runs] == [
        ("gspo", 0, "done", 60.0),
        ("grpo", 0, "done", 60.0),
        ("gspo", 1, "done", 60.0),
    ]
    assert runs[0].final("eval/heldout/accuracy") == pytest.approx(0.52)
    assert runs[0].mean("rollout/reward_mean", last=5) == pytest.approx(0.39)
    assert math.isnan(runs[0].final("no/such/key"))


def test_a_run_that_has_not_ended_is_running(written_study):
    (written_study.run_dir("gspo", 0) / "status.json").unlink()
    run = load_runs(written_study)[0]
    assert (run.status, math.isnan(run.seconds)) == ("running", True)


def test_torn_files_of_a_run_are_said_and_the_rest_is_read(written_study, caplog):
    """What a kill or a full disk leaves: half a row, half an end, an empty summary."""
    folder = written_study.run_dir("gspo", 0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "rollout/rew')
    (folder / "status.json").write_text('{"arm": "gspo", "se')
    (folder / "summary.json").write_text("")
    with caplog.at_level(logging.WARNING):
        run = load_runs(written_study)[0]
    assert (len(run.rows), run.status, run.summary) == (12, "running", None)
    for name in ("status.json", "summary.json"):
        assert f"{folder / name} is torn" in caplog.text


def test_a_null_is_no_value(written_study):
    """metrics.jsonl holds null for what was not finite."""
    folder = written_study.run_dir("gspo", 0)
    rows = [{"step": 1, "learner/grad_norm": None}, {"step": 2, "learner/grad_norm": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, values = load_runs(written_study)[0].series("learner/grad_norm")
    assert (steps.tolist(), values.tolist()) == ([2.0], [3.0])
