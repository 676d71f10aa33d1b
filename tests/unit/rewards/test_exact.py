"""Laws of exact_match."""

from __future__ import annotations

import numpy as np
import pytest

from gspo_dist.data.arithmetic import ANSWER_PATTERN
from gspo_dist.rewards.exact import exact_match, last_match
from gspo_dist.types import Completion, Prompt


def judge(text: str, answer: object, **options) -> tuple[float, dict[str, float]]:
    empty = np.zeros(0)
    return exact_match(
        Prompt("p", (1,), "q", answer), Completion(empty, empty, empty, empty, "stop", text), **options
    )


@pytest.mark.parametrize(
    ("text", "answer", "options", "reward"),
    [
        ("95", "95", {}, 1.0),
        (" 95\n", "95", {}, 1.0),
        (" 95\n", "95", {"strip": False}, 0.0),
        ("95", 95, {}, 1.0),
        ("095", "95", {}, 0.0),
        ("Paris", "paris", {}, 0.0),
        ("Paris", "paris", {"ignore_case": True}, 1.0),
        ("15,09#95", "95", {}, 0.0),
        ("15,09#95", "95", {"pattern": ANSWER_PATTERN}, 1.0),
        ("15,09#95", "#95", {"pattern": r"#\d+"}, 1.0),
        ("#95#96", "95", {"pattern": r"#(\d+)"}, 0.0),
    ],
)
def test_verdicts(text, answer, options, reward):
    assert judge(text, answer, **options) == (reward, {"answered": 1.0})


def test_no_match_is_no_answer_even_to_an_empty_gold():
    for text in ("15,09", "#95 and more"):
        assert judge(text, "", pattern=ANSWER_PATTERN) == (0.0, {"answered": 0.0})


def test_an_empty_optional_group_is_no_answer():
    assert last_match(r"#(\d+)?", "15#") is None


def test_the_last_match_counts():
    assert last_match(r"\d+", "1 22 333") == "333"
