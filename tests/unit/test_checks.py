"""Messages about user input: the rule, what was got, the nearest way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_dist.checks import above, at_least, choose, divisors, nearest


def test_the_nearest_name_comes_first_then_all_of_them():
    assert nearest("trains", ["plan", "train"]) == "did you mean 'train'? known: plan, train"
    assert nearest("zzz", ["plan", "train"]) == "known: plan, train"
    assert nearest("zzz", []) == "known: (none)"
    assert nearest("abxx", ["abcd"]) == "did you mean 'abcd'? known: abcd"  # half of the letters are enough
    assert nearest("axxx", ["abcd"]) == "known: abcd"


def test_a_choice_is_returned_and_anything_else_refused_by_name():
    assert choose("learner.backend", "eager", ["eager", "megatron"]) == "eager"
    message = (
        "learner.backend must be a known name: got 'eagre'; did you mean 'eager'? known: eager, megatron"
    )
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        choose("learner.backend", "eagre", ["eager", "megatron"])
    with pytest.raises(ValueError, match="got 3; known: eager"):
        choose("learner.backend", 3, ["eager"])


@pytest.mark.parametrize("read", [False, "False"])
def test_an_off_that_yaml_read_as_false_is_explained(read):
    with pytest.raises(ValueError, match=r'got .*False.*; YAML reads a bare off as false, so write "off"'):
        choose("logger.wandb.mode", read, ["auto", "off"])
    with pytest.raises(ValueError, match=r"got .*False.*; known: auto"):
        choose("logger.wandb.mode", read, ["auto"])


@pytest.mark.parametrize(
    ("total", "listed"),
    [
        (1, "1"),
        (7, "1, 7"),
        (12, "1, 2, 3, 4, 6, 12"),
        (24, "1, 2, 3, 4, 6, 8, 12, 24"),
        (360, "1, 2, 3, 4, 5, 6, 8, 9, ..."),
    ],
)
def test_divisors_by_hand(total, listed):
    assert divisors(total) == listed


@given(st.integers(1, 500))
def test_every_number_listed_divides_and_none_is_missed(total):
    listed = [int(text) for text in divisors(total, most=total).split(", ")]
    assert all(total % d == 0 for d in listed)
    assert sum(total // d for d in listed) == sum(listed)  # d -> total / d is one to one on the divisors
    assert len(listed) == sum(1 for d in range(1, total + 1) if (total / d).is_integer())


def test_bounds_hold_at_the_bound_and_null_passes():
    at_least("steps", 1, 1)
    above("lr", 1e-9, 0)
    at_least("steps", None, 1)
    above("lr", None, 0)
    with pytest.raises(ValueError, match="steps must be at least 1: got 0"):
        at_least("steps", 0, 1)
    with pytest.raises(ValueError, match=r"lr must be above 0: got 0\.0"):
        above("lr", 0.0, 0)


def test_not_a_number_is_within_no_bound():
    for check in (at_least, above):
        with pytest.raises(ValueError, match="got nan"):
            check("lr", float("nan"), 0)
