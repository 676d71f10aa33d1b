"""AIME's whole numbers, and the others by the math reward, on hand-made files in the published formats."""

from __future__ import annotations

import json

import pytest

from gspo_dist.config import EvaluationConfig, RewardConfig
from gspo_dist.evaluation.problem import Problem
from gspo_dist.evaluation.tasks.maths import AimeGrader, RewardGrader, aime_number
from gspo_dist.evaluation.tasks.table import load_suites
from tests.unit.evaluation.small import write_jsonl

QUESTION = "What is 11 times 3?"
FORMS = {
    "rllm_aime24.json": [{"problem": QUESTION, "answer": "033", "year": 2024}],
    "qwen_aime24.jsonl": [{"id": 60, "problem": QUESTION, "question": QUESTION, "answer": "033", "url": "u"}],
    "nemo_aime24.jsonl": [{"id": "aime24-0", "problem": QUESTION, "expected_answer": "33"}],
    "orz_aime24.json": [{"prompt": [{"from": "user", "value": QUESTION}], "final_answer": "33"}],
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("033", 33), ("33", 33), ("33.0", 33), ("$33$", 33), (r"336^\circ", 336), ("n = 33", 33), ("0", 0),
        ("999", 999), ("1,000", None), ("1000", None), ("-1", None), ("33.5", None), ("x", None), ("", None),
        (r"33\text{ ways}", 33), ("33.", 33),
    ],
)  # fmt: skip
def test_aime_answers_are_whole_numbers_below_1000(text, number):
    assert aime_number(text) == number


def test_aime_outcomes():
    problem = Problem("p", (), "033")
    texts = [r"so \boxed{33}", r"\boxed{34}", r"\boxed{1033}", "<think>33"]
    found = AimeGrader().grade([(problem, text) for text in texts])
    assert [one.correct for one in found] == [True, False, False, False]
    assert [one.why for one in found] == ["", "wrong", "no whole number from 0 to 999", "no answer"]
    assert found[0].answer == "33"


@pytest.mark.parametrize("name", FORMS)
def test_every_published_form_gives_the_same_suite(tmp_path, name):
    file = tmp_path / name
    if name.endswith("l"):
        write_jsonl(file, FORMS[name])
    else:
        file.write_text(json.dumps(FORMS[name]))
    (suite,) = load_suites(EvaluationConfig(suites=("aime24",)), str(tmp_path))
    (problem,) = suite.problems
    assert problem.messages[-1]["content"].startswith(QUESTION + "\n\nPlease reason step by step")
    assert aime_number(str(problem.gold)) == 33
    assert (suite.samples, suite.temperature, suite.top_p) == (32, 0.6, 0.95)
    assert suite.notes[0] == f"file {name}"


def test_an_aime_file_with_an_answer_that_is_none_is_refused(tmp_path):
    write_jsonl(tmp_path / "aime25.jsonl", [{"id": "x7", "problem": "?", "answer": "1200"}])
    with pytest.raises(ValueError, match="problem x7: an AIME answer must be a whole number"):
        load_suites(EvaluationConfig(suites=("aime25",)), str(tmp_path))


def test_rows_of_one_name_get_names_of_their_own(tmp_path):
    rows = [{"id": 1, "problem": "a", "answer": "1"}, {"id": 1, "problem": "b", "answer": "2"}]
    write_jsonl(tmp_path / "aime24.jsonl", rows)
    (suite,) = load_suites(EvaluationConfig(suites=("aime24",)), str(tmp_path))
    assert [p.problem_id for p in suite.problems] == ["0:1", "1:1"]


def test_the_math_reward_grades_with_its_deadline():
    grader = RewardGrader(RewardConfig("math", workers=1))
    gsm8k = Problem("g", (), "48/2=24 clips.\n#### 72")
    half = Problem("h", (), r"\frac{1}{2}")
    try:
        found = grader.grade([(gsm8k, "The answer is 72."), (gsm8k, "#### 48"), (half, r"\boxed{0.5}")])
    finally:
        grader.close()
    assert [(one.correct, one.why) for one in found] == [(True, ""), (False, "wrong"), (True, "")]
    assert found[0].answer == "72"
    assert found[0].detail["reward"] == 1.0
    grader.close()  # a second call does nothing


def test_a_suite_of_ones_own_is_a_file_and_a_reward(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [{"q": "say a", "a": "a"}, {"q": "say b", "a": "b"}])
    options = {
        "file": "mine.jsonl",
        "reward": "exact_match",
        "prompt_key": "q",
        "answer_key": "a",
        "instruction": "One letter.",
        "samples": 2,
    }
    (suite,) = load_suites(EvaluationConfig(suites=("letters",), options={"letters": options}), str(tmp_path))
    assert suite.problems[1].messages == ({"role": "user", "content": "say b\n\nOne letter."},)
    assert suite.samples == 2
    try:
        found = suite.grader.grade([(suite.problems[0], "a"), (suite.problems[1], "a")])
    finally:
        suite.grader.close()
    assert [one.correct for one in found] == [True, False]


def test_golds_that_the_reward_cannot_read_are_named_before_anything_starts(tmp_path):
    file = write_jsonl(tmp_path / "mine.jsonl", [{"id": "k", "question": "?", "answer": {"a": 1}}])
    options = {"mine": {"file": str(file), "reward": "math"}}
    with pytest.raises(ValueError, match=r"k: reward\.function math cannot read the answer"):
        load_suites(EvaluationConfig(suites=("mine",), options=options), None)


def test_rewards_of_a_suite_find_the_variables_of_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("GSPO_MARK", raising=False)
    (tmp_path / "mine.py").write_text(
        "import os\ndef mark(prompt, completion):\n    return float(os.environ['GSPO_MARK'])\n"
    )
    write_jsonl(tmp_path / "own.jsonl", [{"problem": QUESTION, "answer": "33"}])
    options = {"own": {"file": str(tmp_path / "own.jsonl"), "reward": f"{tmp_path}/mine.py:mark"}}
    (suite,) = load_suites(EvaluationConfig(suites=("own",), options=options), None, {"GSPO_MARK": "1.0"})
    try:
        assert [one.correct for one in suite.grader.grade([(suite.problems[0], "33")])] == [True]
    finally:
        suite.grader.close()
