"""CodeForces problems in both published forms, their checkers, and the Elo that the suite reports."""

from __future__ import annotations

import json

import pytest

from gspo_dist.config import EvaluationConfig
from gspo_dist.evaluation.bench import run_suites
from gspo_dist.evaluation.tasks.table import load_suites
from gspo_dist.sandbox.protocol import SandboxError
from tests.unit.evaluation.small import Table, block, contest, write_jsonl

LIMITS = "\n\nTime Limit: 1000 ms\nMemory Limit: 256 MB\n"
RLLM = [
    {"problem": "Say the sum." + LIMITS, "tests": [{"input": "1 2", "output": "3"}]},
    {"problem": "This is an interactive problem." + LIMITS, "tests": [{"input": "1", "output": "1"}]},
    {"problem": "Say yes." + LIMITS, "tests": [{"input": "1", "output": "YES"}]},
]
CHECKER = (
    "import sys\n"
    "given, expected, output = (open(name).read().split() for name in sys.argv[1:])\n"
    "print(int(sorted(output) == sorted(expected) and len(given) == 1))\n"
)
OPEN_R1 = [
    {
        "id": "1971/A", "title": "Any order", "description": "Print 1 and 2.", "input_format": "n",
        "output_format": "two numbers", "examples": [{"input": "5", "output": "1 2"}], "time_limit": 2.0,
        "memory_limit": 256.0, "input_mode": "stdio", "generated_checker": CHECKER,
        "official_tests": [{"input": "5", "output": "1 2"}],
    },
    {"id": "1971/B", "description": "From a file.", "input_mode": "file", "official_tests": []},
    {"id": "1971/C", "description": "Talk.", "interaction_format": "Ask.", "official_tests": []},
]  # fmt: skip


def load(root, **options):
    (suite,) = load_suites(
        EvaluationConfig(suites=("codeforces",), options={"codeforces": options}), str(root)
    )
    return suite


@pytest.fixture
def rllm(tmp_path):
    (tmp_path / "codeforces.json").write_text(json.dumps(RLLM))
    (tmp_path / "metadata_cf.json").write_text(json.dumps(["1971A", "1971B", "1972A"]))
    return tmp_path


def test_rllms_form(rllm):
    suite = load(rllm)
    assert [p.problem_id for p in suite.problems] == ["1971A", "1972A"]
    task = suite.problems[0].gold
    assert (task.time_s, task.memory_mb, task.checker) == (1.0, 256, "words")
    assert "1 problems left out: interactive" in suite.notes
    assert any(note.startswith("2 of 2 problems have no checker") for note in suite.notes)
    assert "time limits x 3 and memory limits x 2, for Python" in suite.notes
    assert any("standings of 0 of 2 contests (none stored" in note for note in suite.notes)
    assert suite.samples == 8
    try:
        found = suite.grader.grade(
            [
                (suite.problems[0], block("print(sum(map(int, input().split())))")),
                (suite.problems[0], block("print(4)")),
                (suite.problems[1], block("print('yes')")),
                (suite.problems[1], "yes"),
                (suite.problems[1], block("1/0")),
            ]
        )
    finally:
        suite.grader.close()
    assert [one.why for one in found] == ["", "wrong", "", "no code", "error"]
    assert found[1].detail["got"] == "4\n"
    assert "ZeroDivisionError" in found[4].detail["stderr"]


def test_time_limits_are_the_problems_times_the_factor(rllm):
    suite, patient = load(rllm, time_factor=0.3), load(rllm, time_factor=5.0)
    slow = block("import time; time.sleep(0.8)\nprint('YES')")
    try:
        (late,) = suite.grader.grade([(suite.problems[1], slow)])
        (in_time,) = patient.grader.grade([(patient.problems[1], slow)])
    finally:
        suite.grader.close()
        patient.grader.close()
    assert (late.why, in_time.correct) == ("time", True)


def test_names_are_needed(tmp_path):
    (tmp_path / "codeforces.json").write_text(json.dumps(RLLM))
    with pytest.raises(ValueError, match="a problem must have a name such as 1971A"):
        load(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(["1971A"]))
    with pytest.raises(ValueError, match="must be a JSON list of 3 names"):
        load(tmp_path, ids=str(tmp_path / "mine.json"))


def test_open_r1s_form_with_its_own_checker(tmp_path):
    write_jsonl(tmp_path / "codeforces_problems.jsonl", OPEN_R1)
    suite = load(tmp_path)
    (problem,) = suite.problems
    assert problem.problem_id == "1971A"
    for part in ("Any order", "Print 1 and 2.", "Input\nn", "Output\ntwo numbers", "Example input\n5"):
        assert part in problem.text
    assert problem.gold.has_own_checker
    assert {"1 problems left out: interactive", "1 problems left out: read from a file"} <= set(suite.notes)
    try:
        right, wrong = suite.grader.grade([(problem, block("print(2, 1)")), (problem, block("print(2, 2)"))])
    finally:
        suite.grader.close()
    assert (right.correct, wrong.why) == (True, "wrong")


def test_a_checker_that_gives_no_verdict_is_no_wrong_answer(tmp_path, monkeypatch):
    from gspo_dist.evaluation.tasks import codeforces

    monkeypatch.setattr(codeforces, "CHECKER_S", 0.5)
    row = {**OPEN_R1[0], "generated_checker": "while True: pass"}
    write_jsonl(tmp_path / "codeforces_problems.jsonl", [row])
    suite = load(tmp_path)
    try:
        with pytest.raises(SandboxError, match="checker gave no verdict"):
            suite.grader.grade([(suite.problems[0], block("print(1, 2)"))])
    finally:
        suite.grader.close()


def test_a_named_checker_is_taken(tmp_path):
    write_jsonl(
        tmp_path / "codeforces_problems.jsonl",
        [{**OPEN_R1[0], "generated_checker": None, "checker": "rcmp4"}],
    )
    (problem,) = load(tmp_path).problems
    assert problem.gold.checker == "rcmp4"


def test_the_suite_reports_elo_and_percentile(rllm):
    (rllm / "all_contest_data.json").write_text(
        json.dumps({"1971": contest(True), "1972": contest(False), "8": contest(True)})
    )
    (rllm / "ratings_2024.json").write_text(json.dumps({"1000": 3, "2000": 1}))
    suite = load(rllm, samples=2)
    right = block("print(sum(map(int, input().split())))")
    sampler = Table({("1971A", 0): right, ("1972A", 1): block("print('YES')")})
    try:
        result = list(run_suites([suite], sampler, rllm / "out", {}))[-1][2]
    finally:
        suite.grader.close()
    # 1971: A at once, the published code gives 856. 1972: A at the second attempt, 10 minutes.
    assert result.details["contests"]["1971"] == 856
    assert result.metrics["elo"] == (856 + result.details["contests"]["1972"]) / 2
    assert result.metrics["elo_contests"] == 2.0
    assert result.metrics["elo_percentile"] == (75.0 if result.metrics["elo"] > 1000 else 0.0)
    assert result.details["ratings_table"] == "ratings_2024.json"
    assert any("standings of 2 of 2 contests" in note for note in suite.notes)
