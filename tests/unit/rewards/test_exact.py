"""Laws of exact_match."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.data.arithmetic import ANSWER_PATTERN
from gspo_dist.rewards.exact import exact_match, last_match
from gspo_dist.rewards.reward import resolve_reward
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
        ("95", " 95\n", {}, 1.0),
        (" 95", " 95", {"strip": False}, 1.0),
        ("95", " 95", {"strip": False}, 0.0),
        ("95", 95, {}, 1.0),
        ("095", "95", {}, 0.0),
        ("Paris", "paris", {}, 0.0),
        ("Paris", "paris", {"ignore_case": True}, 1.0),
        ("15,09#95", "95", {}, 0.0),
        ("15,09#95", "95", {"pattern": ANSWER_PATTERN}, 1.0),
        ("15,09#95", "#95", {"pattern": r"#\d+"}, 1.0),
        ("#95#96", "95", {"pattern": r"#(\d+)"}, 0.0),
        ("42", 42.0, {}, 1.0),
        ("42.0", 42, {}, 1.0),
        ("4.2e1", 42, {}, 1.0),
        ("042", 42, {}, 1.0),
        (" 42 ", 42, {}, 1.0),
        (" 42", 42, {"strip": False}, 0.0),
        ("42.5", 42, {}, 0.0),
        ("forty-two", 42, {}, 0.0),
        ("0.30000000000000001", 0.3, {}, 0.0),
        ("1.5", Decimal("1.50"), {}, 1.0),
        ("x", Fraction(1, 3), {}, 0.0),
        ("42.0", "42", {}, 0.0),
        ("4", ["4", "four"], {}, 1.0),
        ("four", ["4", "four"], {}, 1.0),
        ("Four", ["4", "four"], {"ignore_case": True}, 1.0),
        ("4.0", ["four", 4], {}, 1.0),
        ("5", ["4", "four"], {}, 0.0),
        ("['4', 'four']", ["4", "four"], {}, 0.0),
    ],
)
def test_verdicts(text, answer, options, reward):
    assert judge(text, answer, **options) == (reward, {"answered": 1.0})


def test_no_match_is_no_answer_even_to_an_empty_gold():
    for text in ("15,09", "#95 and more"):
        assert judge(text, "", pattern=ANSWER_PATTERN) == (0.0, {"answered": 0.0})


def test_an_empty_optional_group_is_no_answer():
    assert last_match(r"#(\d+)?", "15#") is None


@pytest.mark.parametrize(("name", "value"), [("strip", "no"), ("strip", 1), ("ignore_case", None)])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"reward.options.{name} must be true or false: got {value!r}"):
        resolve_reward(RewardConfig(function="exact_match", options={name: value}))


def test_a_pattern_must_be_a_regular_expression():
    for pattern in ("(3", 3):
        with pytest.raises(ValueError, match=r"reward\.options\.pattern must be a regular expression: got"):
            resolve_reward(RewardConfig(function="exact_match", options={"pattern": pattern}))
    resolve_reward(RewardConfig(function="exact_match"))
    options = {"pattern": r"#(\d+)$", "strip": False, "ignore_case": True}
    resolve_reward(RewardConfig(function="exact_match", options=options))


def test_the_last_match_counts():
    assert last_match(r"\d+", "1 22 333") == "333"
