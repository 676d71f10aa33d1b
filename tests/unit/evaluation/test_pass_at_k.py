"""pass@k against counting every subset."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest

from gspo_dist.evaluation.pass_at_k import pass_at_k


@pytest.mark.parametrize("n", range(1, 9))
def test_it_is_the_share_of_subsets_that_hold_a_right_one(n):
    for correct in range(n + 1):
        right = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            hits = sum(any(chosen) for chosen in combinations(right, k))
            assert pass_at_k(n, correct, k) == float(Fraction(hits, comb(n, k)))


def test_large_counts_stay_exact():
    exact = Fraction(comb(1000, 400) - comb(997, 400), comb(1000, 400))
    assert pass_at_k(1000, 3, 400) == float(exact)


@pytest.mark.parametrize(
    ("n", "correct", "k", "message"),
    [
        (4, 5, 1, "correct=5, n=4"),
        (4, -1, 1, "correct=-1"),
        (4, 1, 5, "sample more or lower k"),
        (4, 1, 0, "k=0"),
        (0, 0, 1, "sample more or lower k"),
    ],
)
def test_impossible_counts_are_refused(n, correct, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, correct, k)
