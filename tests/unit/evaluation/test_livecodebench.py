"""LiveCodeBench's rows, window, prompt and tests."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import pytest

from gspo_dist.config import EvaluationConfig
from gspo_dist.evaluation.tasks import livecodebench as lcb
from gspo_dist.evaluation.tasks.table import load_suites
from tests.unit.evaluation.small import block, livecodebench_row, packed_tests, write_jsonl

SUM = "print(sum(map(int, input().split())))"
FUNCTION = {
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
    "private_test_cases": packed_tests([{"input": "4\n5", "output": "9", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "add"}),
}


def load(root, name="livecodebench", **options):
    (suite,) = load_suites(EvaluationConfig(suites=(name,), options={name: options}), str(root))
    return suite


class Evil:
    def __reduce__(self):
        return print, ("owned",)


@pytest.mark.parametrize("value", [Evil(), [1, Evil()], b"bytes", 7])
def test_a_pickle_that_is_no_text_is_refused_and_runs_nothing(value, capsys):
    payload = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
    with pytest.raises(ValueError, match="private_test_cases must be"):
        lcb.private_tests(payload)
    assert "owned" not in capsys.readouterr().out


@pytest.mark.parametrize("payload", ["", "not base64!", base64.b64encode(b"no zlib").decode(), '{"a": 1}'])
def test_torn_private_tests_are_refused(payload):
    with pytest.raises(ValueError, match="private_test_cases must be"):
        lcb.private_tests(payload)


def test_private_tests_that_unpack_to_too_much_are_refused(monkeypatch):
    monkeypatch.setattr(lcb, "LONGEST_TESTS", 1000)
    with pytest.raises(ValueError, match="they unpack to more"):
        lcb.private_tests(packed_tests([{"input": "x" * 5000, "output": "y"}]))


def test_both_published_forms_of_private_tests():
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    assert lcb.private_tests(json.dumps(tests)) == lcb.private_tests(packed_tests(tests)) == tests


@pytest.mark.parametrize(
    ("date", "days", "official"),
    [
        ("2024-09-30T23:59:00", False, False),
        ("2024-10-01T00:00:00", True, True),
        ("2025-02-28", True, True),
        ("2025-02-28T06:30:00", True, False),
        ("2025-03-01", False, False),
    ],
)
def test_the_window_by_days_and_by_the_official_rule(date, days, official):
    window = ("2024-10-01", "2025-02-28")
    assert lcb.in_window(date, *window, "days") is days
    assert lcb.in_window(date, *window, "official") is official
    assert lcb.in_window(date, None, None, "days")


def test_the_papers_window_takes_its_problems_of_release_v5(tmp_path):
    folder = tmp_path / "code_generation_lite"
    dates = ["2024-09-30", "2024-10-01", "2025-01-04", "2025-02-28T10:00:00", "2025-03-01"]
    for i, date in enumerate(dates):
        write_jsonl(folder / f"test{i + 1 if i else ''}.jsonl", [livecodebench_row(f"p{i}", date)])
    write_jsonl(folder / "test6.jsonl", [livecodebench_row("p6", "2024-12-01")])
    suite = load(tmp_path, "livecodebench_paper")
    assert [p.problem_id for p in suite.problems] == ["p1", "p2", "p3"]
    assert (suite.samples, suite.name) == (8, "livecodebench_paper")
    assert "contest dates 2024-10-01 to 2025-02-28 (days): 3 problems, 2 outside" in suite.notes
    assert [p.problem_id for p in load(tmp_path, "livecodebench_paper", window_rule="official").problems] == [
        "p1",
        "p2",
    ]
    assert len(load(tmp_path).problems) == 6
    assert len(load(tmp_path, release="v2").problems) == 2
    (folder / "test2.jsonl").unlink()
    with pytest.raises(ValueError, match=r"release v5 needs .* lacks test2\.jsonl"):
        load(tmp_path, "livecodebench_paper")


def test_the_official_prompt():
    system, user = lcb.messages_of(livecodebench_row("p", "2024-10-01"), thinking=False)
    assert system["role"] == "system"
    assert system["content"].endswith("You will NOT return anything except for the program.")
    assert user["content"] == (
        "### Question:\nAdd two numbers (p).\n\n### Format: Read the inputs from stdin solve the "
        "problem and write the answer to stdout (do not directly test on the sample inputs). "
        "Enclose your code within "
        "delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format "
        "with backticks)\n\n"
    )
    system, user = lcb.messages_of(livecodebench_row("p", "2024-10-01", **FUNCTION), thinking=True)
    assert "NOT return" not in system["content"]
    assert "### Format: You will use the following starter code" in user["content"]
    assert f"```python\n{FUNCTION['starter_code']}\n```" in user["content"]


def test_programs_are_judged_on_public_and_private_tests(tmp_path):
    rows = [livecodebench_row("abc311_c", "2024-10-01"), livecodebench_row("f", "2024-11-01", **FUNCTION)]
    write_jsonl(tmp_path / "livecodebench_rows.jsonl", rows)
    suite = load(tmp_path)
    assert any("1 problems stand in the benchmark's errata" in note for note in suite.notes)
    add, function = suite.problems
    method = "class Solution:\n    def add(self, a, b):\n        return a + b"
    texts = [
        (add, block(SUM)),
        (add, block("print(3)")),  # right on the public test alone
        (add, SUM),  # no block
        (function, block(method)),
        (function, block(method.replace("+", "-"))),
        (function, block("def add(a, b):\n    while True: pass")),
    ]
    try:
        found = suite.grader.grade(texts[:5])
    finally:
        suite.grader.close()
    assert [one.correct for one in found] == [True, False, False, True, False]
    assert [one.why for one in found] == ["", "wrong", "no code", "", "wrong"]
    assert found[1].detail["test"] == 1
    assert (found[1].detail["input"], found[1].detail["expected"]) == ("20 22\n", "42\n")
    assert found[1].detail["got"] == "3\n"
    assert (found[4].detail["test"], found[4].detail["got"]) == (0, "-1")
    assert found[0].answer == SUM


def test_a_row_that_is_none_is_named(tmp_path):
    rows = [livecodebench_row("a", "2024-10-01"), {"question_id": "b"}]
    write_jsonl(tmp_path / "livecodebench.jsonl", rows)
    with pytest.raises(ValueError, match=r"livecodebench\.jsonl:2: no row of LiveCodeBench: KeyError"):
        load(tmp_path)
    write_jsonl(tmp_path / "livecodebench.jsonl", rows[:1])
    with pytest.raises(ValueError, match="has no problem in the window 2030"):
        load(tmp_path, start="2030-01-01")
