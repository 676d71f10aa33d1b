"""Laws of the quickstart's task: solutions are right, errors are those asked for, splits never meet."""

from __future__ import annotations

import re
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_dist.data.arithmetic import (
    ANSWER_PATTERN,
    Addition,
    Habits,
    is_heldout,
    problems,
    stream,
    worked_solution,
)

OPERANDS = st.integers(100, 999)


def answer_of(solution: str) -> int:
    return int(re.search(ANSWER_PATTERN, solution).group(1))


@given(OPERANDS, OPERANDS, st.integers(0, 99))
def test_a_pupil_without_bad_habits_is_right(left, right, seed):
    solution = worked_solution(Addition(left, right), np.random.default_rng(seed))
    assert answer_of(solution) == left + right


def test_both_styles_of_one_sum():
    question, rng = Addition(347, 285), np.random.default_rng(0)
    assert worked_solution(question, rng, Habits(long_style=1.0)) == "7+5=12,4+8+1=13,3+2+1=06#632"
    assert worked_solution(question, rng, Habits(long_style=0.0)) == "12,13,06#632"


def test_forgotten_carries_are_left_out_of_every_column():
    habits = Habits(forget_carry=1.0, long_style=1.0)
    # 5+7=12 hands a carry that is dropped, 4+8=12 another; the last column's own carry is written out.
    assert (
        worked_solution(Addition(945, 387), np.random.default_rng(0), habits) == "5+7=12,4+8=12,9+3=12#1222"
    )


def test_share_of_forgotten_carries_is_the_one_asked_for():
    rng, question = np.random.default_rng(0), Addition(115, 115)
    wrong = sum(
        answer_of(worked_solution(question, rng, Habits(forget_carry=0.58))) != 230 for _ in range(4000)
    )
    assert abs(wrong / 4000 - 0.58) < 4 * (0.58 * 0.42 / 4000) ** 0.5


def test_slips_are_off_by_one_in_some_column():
    rng = np.random.default_rng(0)
    differences = {
        answer_of(worked_solution(Addition(311, 422), rng, Habits(slip=0.3))) - 733 for _ in range(2000)
    }
    one_column = {0, 1, -1, 10, -10, 100, -100}
    assert one_column <= differences
    assert all(abs(d) <= 111 for d in differences)


@pytest.mark.parametrize(
    ("left", "right", "carries"), [(111, 222, 0), (115, 115, 1), (999, 999, 2), (511, 511, 0)]
)
def test_carries_into_a_column_of_the_operands(left, right, carries):
    assert Addition(left, right).carries == carries


@given(OPERANDS, OPERANDS)
def test_an_addition_and_its_mirror_image_are_in_the_same_split(left, right):
    assert is_heldout(Addition(left, right), 0.1) == is_heldout(Addition(right, left), 0.1)


def test_heldout_share_of_all_pairs():
    pairs = [Addition(a, b) for a in range(10, 100) for b in range(a, 100)]
    assert abs(sum(is_heldout(q, 0.1) for q in pairs) / len(pairs) - 0.1) < 4 * (0.09 / len(pairs)) ** 0.5


def test_splits_do_not_meet_whatever_the_seeds():
    heldout: set[tuple[int, int]] = set()
    for seed in range(3):
        heldout |= {
            tuple(sorted((q.left, q.right))) for q in problems("heldout", size=300, seed=seed, digits=2)
        }
        train = {
            tuple(sorted((q.left, q.right))) for q in problems("train", size=3000, seed=seed + 7, digits=2)
        }
        assert not heldout & train


def test_problems_are_distinct_repeatable_and_of_the_asked_width():
    first, again = (problems("train", size=2000, seed=3) for _ in range(2))
    assert first == again
    assert len(set(first)) == 2000
    assert all(100 <= n <= 999 for q in first for n in (q.left, q.right))
    assert problems("train", size=2000, seed=4) != first


def test_a_longer_list_begins_with_the_shorter_one():
    assert problems("train", size=500, seed=1)[:100] == problems("train", size=100, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test", "size": 1}, "split must be one of train, heldout: got 'test'"),
        ({"split": "train", "size": 0}, "size must be at least 1: got 0"),
        ({"split": "heldout", "size": 500, "digits": 1}, "lower data.options.size"),
        ({"split": "train", "size": 1, "digits": 12}, "digits must be between 1 and 9: got 12"),
        (
            {"split": "train", "size": 1, "heldout_share": 1.0},
            "heldout_share must be between 0 and 1: got 1.0",
        ),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        problems(arguments.pop("split"), seed=0, **arguments)


def test_stream_is_endless_and_stays_in_its_split():
    some = list(islice(stream(np.random.default_rng(0), "heldout", digits=3, heldout_share=0.1), 700))
    assert len(some) == 700
    assert all(is_heldout(q, 0.1) for q in some)
