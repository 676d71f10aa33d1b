"""LiveCodeBench's rules, against outputs of its published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_dist.rewards.livecodebench import PREAMBLE, code_of, last_block, same_output, same_result

CASES = next((p for parent in Path(__file__).parents if (p := parent / "shared/cases").is_dir()), None)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("42", "42\n", True),
        ("\n 42 \n\n", "42", True),
        ("1\r\n2", "1\n2\r\n", True),
        ("7.0", "007", True),
        ("5e-1", "0.5", True),
        ("1\t2", "1 2", True),
        ("a  b", "a b", False),
        ("Yes", "YES", False),
        ("1\n\n2", "1\n2", False),
        ("0.333333333", "0.3333333333", False),
        ("100000000000000000001", "100000000000000000000", False),
        ("", "0", False),
        ("3\nmore", "3", False),
        ("1 x", "1.0 x", False),
        ("nan", "NaN", False),
    ],
)
def test_outputs(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("result", "expected", "same"),
    [
        ("2", "2.0", True),
        ("true", "1", True),
        ('"42"', "42", False),
        ("null", "42", False),
        ("[[0, 0]]", "[[0, 0]]", True),
        ('[["\\u0000tuple", 0, 0]]', "[[0, 0]]", False),
        ("0.30000000000000004", "0.3", False),
        ("no JSON", "1", False),
    ],
)
def test_results(result, expected, same):
    assert same_result(result, expected) is same


@pytest.mark.parametrize(
    ("text", "official", "complete"),
    [
        ("Here:\n```python\nprint(1)\n```\n", "print(1)", "print(1)"),
        ("print(1)", "", ""),
        ("```\na\n```\nIn full:\n```\nb", "In full:", "a"),
        ("```\na\n```\nExample:\n```\nb\n```", "b", "b"),
        ("```python\n```", "", ""),
        ("```python\nprint(1)\n``` end", "print(1)", "print(1)"),
    ],
)
def test_which_code_is_taken(text, official, complete):
    assert code_of(text) == official
    assert last_block(text) == complete


def test_the_preamble_keeps_the_built_in_pow():
    names: dict[str, object] = {}
    exec(PREAMBLE, names)
    assert names["pow"] is pow
    assert names["open"] is open
    assert {"heappush", "deque", "Counter", "lru_cache", "List", "math", "json"} <= set(names)


@pytest.mark.skipif(CASES is None, reason="the published cases do not lie beside this checkout")
def test_the_published_pairs_and_extractions():
    assert CASES is not None
    pairs = [json.loads(line) for line in (CASES / "comparisons.jsonl").read_text().splitlines()]
    assert pairs
    assert [
        p["id"] for p in pairs if same_output(p["program_output"], p["expected_output"]) != p["same"]
    ] == []
    texts = [json.loads(line) for line in (CASES / "extractions.jsonl").read_text().splitlines()]
    assert texts
    assert [t["id"] for t in texts if code_of(t["response"]) != t["code"]] == []
