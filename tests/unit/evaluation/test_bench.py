"""A suite from asking to its result: figures, interruptions, failures on a page."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gspo_dist.evaluation.bench import SuiteRun, figures, run_suites
from gspo_dist.evaluation.problem import Outcome, Problem, Tried
from gspo_dist.evaluation.table import results_table
from tests.unit.evaluation.small import Table, suite

TEXTS = {("p0", 0): "1", ("p0", 1): "1", ("p1", 0): "1", ("p1", 1): "00"}


def run(folder, own=None, sampler=None, setting=None):
    own, sampler = own or suite(), sampler or Table(TEXTS)
    steps = list(run_suites([own], sampler, folder, setting or {"model": "m"}))
    return own, sampler, steps[-1][2]


def test_the_figures_by_hand(tmp_path):
    _, sampler, result = run(tmp_path)
    assert sampler.asked == [("p0", 0), ("p1", 0), ("p2", 0), ("p0", 1), ("p1", 1), ("p2", 1)]
    assert result.metrics == pytest.approx(
        {
            "avg@2": 0.5,  # shares 1, 1/2, 0
            "avg@2_standard_error": (0.5 / 6) ** 0.5,  # sum of squares 1/2 over 3 x 2
            "pass@1": 0.5,
            "pass@2": 2 / 3,
            "problems": 3.0,
            "completion_length_mean_tokens": 7 / 6,
            "truncated_fraction": 1 / 6,
        },
        rel=1e-12,
    )
    assert result.logged()["eval/own/avg@2"] == 0.5
    assert result.details["by_difficulty"] == {"easy": 0.5}
    assert "@2 0.500" in results_table([result])
    whole = json.loads((tmp_path / "own/result.json").read_text())
    assert whole["metrics"] == result.metrics
    assert [s["correct"] for s in whole["samples"]] == [True, True, True, False, False, False]
    assert whole["samples"][3] == {
        "problem": "p1",
        "sample": 1,
        "correct": False,
        "why": "wrong",
        "answer": "00",
        "completion": "00",
        "tokens": 2,
        "finish_reason": "length",
        "detail": {},
    }


def test_pass_at_k_of_eight():
    tried = [Tried(Problem("a", (), ""), (True,) + (False,) * 7)]
    row = {"tokens": 1, "finish_reason": "stop"}
    found = figures(tried, [row] * 8)
    assert [found[f"pass@{k}"] for k in (1, 2, 4, 8)] == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1.0], rel=1e-12)
    assert "avg@8_standard_error" not in found  # one problem has none


def test_an_interrupted_suite_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(tmp_path, sampler=Table(TEXTS, breaks_after=4))
    kept = (tmp_path / "own/samples.jsonl").read_text().splitlines()
    assert len(kept) == 4  # what was sampled is graded
    with (tmp_path / "own/samples.jsonl").open("a") as file:
        file.write('{"problem": "p2", "sam')  # torn by a kill
    own, sampler, result = run(tmp_path)
    done = {(json.loads(line)["problem"], json.loads(line)["sample"]) for line in kept}
    assert set(sampler.asked) == {(p, s) for p in ("p0", "p1", "p2") for s in (0, 1)} - done
    assert len(own.grader.graded) == 6 - len(kept)
    assert result.metrics["avg@2"] == 0.5
    assert (tmp_path / "own/samples.jsonl").read_text().count("\n") == 6
    _, again, result = run(tmp_path)
    assert again.asked == []
    assert result.metrics["avg@2"] == 0.5


@pytest.mark.parametrize(
    ("changes", "setting", "differs"),
    [
        ({"temperature": 0.6}, {"model": "m"}, "temperature"),
        ({"samples": 3}, {"model": "m"}, "samples"),
        ({}, {"model": "other"}, "model"),
    ],
)
def test_samples_of_another_setting_are_never_mixed_in(tmp_path, changes, setting, differs):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"samples of another setting .*{differs}.*take another run_dir"):
        SuiteRun(replace(suite(), **changes), Table({}), tmp_path / "own", setting)


def test_a_grader_that_fails_ends_the_suite_and_keeps_what_is_graded(tmp_path):
    own = suite(count=1, samples=3)

    class Broken:
        def grade(self, items):
            (item,) = items
            if item[1] == "bad":
                raise OSError("the sandbox is down")
            return [Outcome(True)]

        def close(self):
            pass

    own = replace(own, grader=Broken())
    with pytest.raises(OSError, match="the sandbox is down"):
        run(tmp_path, own, Table({("p0", 0): "1", ("p0", 1): "bad"}))
    assert '"sample": 0' in (tmp_path / "own/samples.jsonl").read_text()
    assert not (tmp_path / "own/result.json").exists()


def test_what_a_suite_adds_is_logged_where_it_is_a_number(tmp_path):
    def more(tried):
        return {"elo": float(sum(sum(one.correct) for one in tried)), "contests": {"1": 7}}

    _, _, result = run(tmp_path, suite(more=more, notes=("by words",)))
    assert result.logged()["eval/own/elo"] == 3.0
    assert result.details["contests"] == {"1": 7}
    assert "eval/own/contests" not in result.logged()
    assert result.notes == ("by words",)


def test_the_page_shows_prompt_completion_and_the_test_that_failed(tmp_path):
    class Judge:
        def grade(self, items):
            detail = {"test": 4, "input": "7 <8>", "expected": "15", "got": "78", "stderr": "oops"}
            return [Outcome(t == "1", t, "" if t == "1" else "wrong", detail) for _, t in items]

        def close(self):
            pass

    texts = {("p0", 0): "1", ("p0", 1): "1", ("p1", 0): "1", ("p1", 1): "<script>alert(1)</script>"}
    run(tmp_path, replace(suite(count=2), grader=Judge()), Table(texts))
    page = (tmp_path / "own/failures.html").read_text()
    assert "1 of 2 problems were not always solved" in page
    assert "question 1" in page
    assert "question 0" not in page
    assert "1 of 2 right; sample 1: wrong, test 5" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" not in page
    for text in ("7 &lt;8&gt;", ">15<", ">78<", ">oops<"):
        assert text in page


def test_a_table_names_the_table_of_its_percentile(tmp_path):
    _, _, result = run(tmp_path)
    numbers = {**result.metrics, "elo": 1520.6, "elo_contests": 3.0, "elo_percentile": 88.1}
    rated = replace(result, metrics=numbers, details={"ratings_table": "ratings_2024.json"})
    assert "1521 over 3 contests, above 88.1% of ratings_2024.json" in results_table([rated])
