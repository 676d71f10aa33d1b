"""Laws of answers: what counts as a number, and what is refused before a run."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from gspo_dist.rewards.answers import alternatives, check_answer, is_number, number_in


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("-0.50", Decimal("-0.5")), ("+7", 7), (".5", Decimal("0.5")), ("7.", 7), ("2E3", 2000),
        ("1e-2", Decimal("0.01")), ("0.1", Decimal("0.1")), ("12345678901234.5", Decimal("12345678901234.5")),
    ],
)  # fmt: skip
def test_a_number_is_read_exactly(text, value):
    assert number_in(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "four",
        "1,000",
        "1_000",
        "1 000",
        " 1",
        "nan",
        "inf",
        "1/2",
        "\u0664",
        "--1",
        ".",
        "1e",
        "1e" + 20 * "9",
    ],
)
def test_nothing_else_is_a_number(text):
    assert number_in(text) is None


def test_which_answers_are_numbers():
    assert all(map(is_number, (0, 1.5, Decimal("1.5"), np.float32(1.5), np.int64(2), Fraction(1, 3))))
    assert not any(map(is_number, ("1", True, None, [1], 1j)))


def test_a_list_means_any_of():
    assert alternatives(["4", "four"]) == ["4", "four"]
    assert alternatives(("4",)) == ["4"]
    assert alternatives("four") == ["four"]
    assert alternatives(4) == [4]


@pytest.mark.parametrize(
    "answer", ["4", 42, 42.0, Decimal("1.5"), np.float64(2.5), ["4", "four"], ("4", 4), "x+1"]
)
def test_texts_numbers_and_lists_pass(answer):
    check_answer(answer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"value": "2"}, "got a mapping with the fields value; write one of them as the answer"),
        ({}, "got a mapping with the fields none"),
        ([], "got an empty list"),
        (None, "got None of type NoneType"),
        (True, "got True of type bool; write it as the text that is right"),
        (b"4", "got b'4' of type bytes"),
        (datetime.date(2020, 1, 2), "of type date"),
        ([["4"]], "got ['4'] of type list"),
        (["4", {"value": 4}], "of type dict"),
        ("", "got the empty text ''"),
        ("  ", "got the empty text '  '"),
        (float("nan"), "got nan, which no completion equals"),
        (Decimal("Infinity"), "which no completion equals"),
    ],
)
def test_what_no_completion_could_give_is_refused(answer, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        check_answer(answer)
    assert "an answer must be a text, a number, or a list of them (any of which is right)" in str(
        caught.value
    )
