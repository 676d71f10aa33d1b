"""Longest first: every item once, no capacity passed, and at most 4/3 of the best largest load."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_dist.partition import longest_first


def loads(weights: list[int], members: list[list[int]]) -> list[int]:
    return [sum(weights[i] for i in bin) for bin in members]


def best_largest_load(weights: list[int], bins: int) -> int:
    """By trying every dealing."""
    return min(
        max(sum(w for w, at in zip(weights, dealt, strict=True) if at == b) for b in range(bins))
        for dealt in product(range(bins), repeat=len(weights))
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=7), st.integers(1, 3))
def test_the_largest_load_is_at_most_four_thirds_of_the_best(weights, bins):
    members = longest_first(weights, bins)
    assert members is not None
    assert sorted(i for bin in members for i in bin) == list(range(len(weights)))
    assert len(members) == bins
    # Graham: 4/3 - 1/(3 bins), in whole numbers
    assert 3 * bins * max(loads(weights, members)) <= (4 * bins - 1) * best_largest_load(weights, bins)


@pytest.mark.parametrize(
    ("weights", "bins", "members"),
    [
        ([5, 3, 4, 2], 2, [[0, 3], [2, 1]]),
        ([7, 7, 7], 3, [[0], [1], [2]]),
        ([1, 1, 1, 1], 2, [[0, 2], [1, 3]]),  # ties: the lower index first, to the lower bin
        ([5, 5, 4, 4, 3, 3, 3], 3, [[0, 4, 6], [1, 5], [2, 3]]),  # its worst case: 11, where 9 is possible
        ([], 2, [[], []]),
    ],
)
def test_by_hand(weights, bins, members):
    assert longest_first(weights, bins) == members


def test_a_bin_that_would_overflow_gives_nothing():
    assert longest_first([5, 3, 4, 2], 2, capacity=7) == [[0, 3], [2, 1]]
    assert longest_first([5, 3, 4, 2], 2, capacity=6) is None
    assert longest_first([9], 3, capacity=8) is None
