"""From a name and options to a suite: what is found, what is refused, what is sampled."""

from __future__ import annotations

import logging

import pytest

from gspo_dist.config import EvaluationConfig
from gspo_dist.evaluation.files import find
from gspo_dist.evaluation.tasks.table import MAKERS, load_suites
from tests.unit.evaluation.small import write_jsonl

ROWS = [{"id": i, "problem": f"{i}?", "answer": str(i)} for i in range(5)]


def load(root, *names, **options):
    return load_suites(EvaluationConfig(suites=names, options=options), str(root) if root else None)


def test_options_of_all_and_of_the_suite(tmp_path):
    write_jsonl(tmp_path / "deep/aime24.jsonl", ROWS)
    write_jsonl(tmp_path / "aime25.jsonl", ROWS)
    first, second = load(
        tmp_path,
        "aime24",
        "aime25",
        all={"samples": 3, "limit": 2},
        aime25={"samples": 1, "temperature": 0.0},
    )
    assert (first.samples, first.temperature, len(first.problems)) == (3, 0.6, 2)
    assert (second.samples, second.temperature, len(second.problems)) == (1, 0.0, 2)
    assert "only the first 2 of 5 problems" in second.notes
    assert first.setting()["problems"] == ["0", "1"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("aime42",), {}, "unknown suite 'aime42'; did you mean 'aime2"),
        (("aime24",), {"aime24": {"sample": 3}}, "aime24 has no option 'sample'; did you mean 'samples'"),
        (("aime24",), {"aime25": {}}, "may hold all and the suites of the run: got 'aime25'"),
        (("aime24",), {"aime24": {"samples": 0}}, "aime24.samples must be at least 1: got 0"),
        (("aime24",), {"aime24": {"top_p": 0.0}}, "aime24.top_p must be above 0"),
        (("gsm8k",), {}, "gsm8k found no file below"),
        (("aime24",), {"aime24": {"top_p": 1.5}}, "aime24.top_p must be at most 1: got 1.5"),
        (("aime24",), {"aime24": {"samples": "3"}}, "aime24.samples must be a whole number: got '3'"),
        (
            ("livecodebench",),
            {"all": {"end": "2025-02"}},
            "livecodebench.end must be a day such as 2024-10-01",
        ),
        (("aime24",), {"aime24": {"file": "none.jsonl"}}, "no such file: .*none.jsonl; it can be had from"),
        (("codeforces",), {}, "codeforces found no file .*open-r1/codeforces"),
        (("livecodebench",), {"livecodebench": {"release": "v9"}}, "must be a release: got 'v9'"),
        (("livecodebench",), {"livecodebench": {"window_rule": "x"}}, "must be days or official: got 'x'"),
        (("livecodebench",), {}, "livecodebench/code_generation_lite"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(tmp_path, names, options, message):
    write_jsonl(tmp_path / "aime24.jsonl", ROWS)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *names, **options)


def test_without_a_root_nothing_is_found_and_nothing_downloaded():
    with pytest.raises(ValueError, match=r"aime24 needs a local copy of its data: set data\.root"):
        load(None, "aime24")
    with pytest.raises(ValueError, match=r"data\.root must be a folder"):
        load("/no/such/folder", "aime24")


def test_of_several_copies_the_first_is_taken_and_all_are_named(tmp_path, caplog):
    for name in ("b_aime24.jsonl", "a_aime24.jsonl", "aime24.txt"):
        write_jsonl(tmp_path / name, ROWS)
    with caplog.at_level(logging.WARNING):
        assert find("aime24", str(tmp_path), None, ("*aime*24*",), "x").name == "a_aime24.jsonl"
    assert "also b_aime24.jsonl" in caplog.text
    assert "gspo data A --against B" in caplog.text
    assert find("aime24", str(tmp_path), "b_aime24.jsonl", (), "x").name == "b_aime24.jsonl"


def test_a_test_file_of_another_data_set_is_not_taken(tmp_path):
    write_jsonl(tmp_path / "math/test.jsonl", ROWS)
    with pytest.raises(ValueError, match="gsm8k found no file below"):
        load(tmp_path, "gsm8k")
    write_jsonl(tmp_path / "grade-school-math/grade_school_math/data/test.jsonl", ROWS[:2])
    (suite,) = load(tmp_path, "gsm8k")
    assert len(suite.problems) == 2
    (suite,) = load(
        tmp_path / "grade-school-math/grade_school_math/data", "gsm8k", gsm8k={"file": "test.jsonl"}
    )
    assert len(suite.problems) == 2


def test_what_changes_questions_answers_or_verdicts_is_another_setting(tmp_path):
    file = str(write_jsonl(tmp_path / "own.jsonl", ROWS))
    other = str(write_jsonl(tmp_path / "other.jsonl", [{**ROWS[0], "answer": "7"}, *ROWS[1:]]))

    def setting(**changes):
        return load(None, "own", own={"file": file, **changes})[0].setting()

    assert setting() == setting(workers=1) == setting(correct_at=1.0)
    for changes in ({"file": other}, {"instruction": "!"}, {"correct_at": 0.5}, {"reward": "exact_match"}):
        assert setting(**changes) != setting(), changes


def test_every_suite_of_the_issue_has_its_maker():
    assert set(MAKERS) == {
        "aime24", "aime25", "amc", "math500", "gsm8k", "livecodebench", "livecodebench_paper", "codeforces",
        "humaneval",
    }  # fmt: skip
