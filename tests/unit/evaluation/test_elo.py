"""Ratings against the published code's outputs on the same contests, and against sums by hand."""

from __future__ import annotations

import json
import math

import pytest

from gspo_dist.evaluation import elo
from gspo_dist.evaluation.problem import Problem, Tried
from gspo_dist.evaluation.tasks.codeforces import ratings
from tests.unit.evaluation.small import contest

T, F = True, False
# (with points, attempts, rank, rating): CodeElo's formula as AReaL publishes it, run on these contests.
PUBLISHED = [
    (True, {"A": [T]}, 225, 856),
    (True, {"A": [F, F, T], "B": [T]}, 194, 1225),
    (True, {"A": [T], "B": [T], "C": [T], "D": [F, T], "E": [T]}, 0, 3099),
    (True, {"A": [F] * 8}, 240, 300),
    (True, {"A": [F] * 7 + [T], "C": [F, T]}, 187, 1294),
    (False, {"A": [T]}, 200, 1163),
    (False, {"A": [F, F, T], "B": [T]}, 160, 1552),
    (False, {"A": [T], "B": [T], "C": [T], "D": [F, T], "E": [T]}, 40, 2687),
    (False, {"A": [F] * 8}, 240, 300),
    (False, {"A": [F] * 7 + [T], "C": [F, T]}, 167, 1486),
]


def read(points: bool) -> elo.Contest:
    found = elo.read_contest("1971" if points else "1972", contest(points))
    assert found is not None
    return found


@pytest.mark.parametrize(("points", "attempts", "rank", "rating"), PUBLISHED)
def test_rank_and_rating_are_those_of_the_published_code(points, attempts, rank, rating):
    own = read(points)
    named = {f"{own.contest_id}{letter}": tries for letter, tries in attempts.items()}
    assert elo.rank_of(*elo.score(own, named), own.rows) == rank
    assert elo.rating(own, named) == rating


def test_the_rating_is_where_the_expected_place_crosses_the_rank():
    """By another way than bisection: the expected place of every rating, one after the other."""
    own = read(True)

    def expected(r: int) -> float:
        return 1 + sum(1 / (1 + 10 ** ((r - other) / 400)) for other in own.ratings)

    for rank in (20, 60, 180):
        first_below = next(r for r in range(4000) if expected(r) < rank)
        assert elo.rating_at(rank, own.ratings) == first_below - 1
    assert elo.rating_at(0, own.ratings) == max(own.ratings) + 99  # nobody can be rated higher


def test_scores_by_hand():
    own = read(True)  # points 500, 1000, 1500, 2000, 2500
    assert elo.score(own, {"1971A": [F, F, T, F], "1971B": [F]}) == (400.0, 0.0)
    assert elo.score(own, {"1971A": [F] * 11 + [T]}) == (0.0, 0.0)
    assert elo.score(read(False), {"1972A": [F, T], "1972C": [T], "1972D": [F, F]}) == (2.0, 10.0)


def test_equal_rows_stand_before_the_model():
    rows = [(30.0, 0.0), (20.0, 5.0), (20.0, 9.0), (10.0, 0.0)]
    assert [elo.rank_of(points, 9.0, rows) for points in (31, 20, 10, 9)] == [0, 3, 4, 4]
    assert elo.rank_of(20.0, 4.0, rows) == 1


def test_people_without_a_rating_are_dropped_and_small_contests_left_out(tmp_path):
    stored = contest(True)
    del stored["rating_changes"]["result"][0]
    found = elo.read_contest("1971", stored)
    assert found is not None
    assert len(found.rows) == len(found.ratings) == 239
    assert found.rows[0][0] == 7000 - 29
    assert elo.read_contest("1971", contest(True, people=200)) is None
    assert elo.read_contest("1971", contest(True, people=201)) is not None
    file = tmp_path / "all_contest_data.json"
    file.write_text(json.dumps({"1971": contest(True), "3": contest(True, people=100)}))
    contests, left_out = elo.read_contests(file, ["1971", "3", "7"])
    assert list(contests) == ["1971"]
    assert left_out["7"] == "no stored standings"
    assert "200" in left_out["3"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own/1971.json").write_text(json.dumps(contest(True)))
    assert list(elo.read_contests(tmp_path / "own", ["1971", "7"])[0]) == ["1971"]


def test_percentiles(tmp_path):
    # The published code on the ratings 800, 810, ..., 3290, four people each.
    table = {800 + 10 * i: 4 for i in range(250)}
    for rating, percent in (
        (799, 0.0),
        (800, 0.0),
        (1234.5, 17.6),
        (1500, 28.0),
        (3290, 99.6),
        (3291, 100.0),
    ):
        assert elo.percentile(rating, table) == percent
    file = tmp_path / "ratings.json"
    file.write_text(json.dumps([5, 7, 7]))
    assert elo.read_table(file) == {5: 1, 7: 2}
    file.write_text(json.dumps({"5": 3}))
    assert elo.read_table(file) == {5: 3}
    for nothing in ([], {}, 7):
        file.write_text(json.dumps(nothing))
        with pytest.raises(ValueError, match=r"ratings\.json must be a JSON object"):
            elo.read_table(file)


def tried(name: str, *correct: bool) -> Tried:
    return Tried(Problem(name, (), None), correct)


def test_a_suite_is_rated_by_the_mean_over_its_contests():
    contests = {"1971": read(True), "1972": read(False), "9": read(True)}
    contests["9"] = elo.Contest("9", contests["9"].rows, contests["9"].ratings, {"9A": 500.0})
    found = ratings(
        [tried("1971A", F, F, T), tried("1971B", T, F, F), tried("1972A", T, T, F), tried("5A", T, T, T)],
        contests,
        {"5": "no stored standings"},
        {1000: 1, 1200: 2, 1300: 1},
        "mine.json",
    )
    assert found["contests"] == {"1971": 1225, "1972": 1163}
    assert found["elo"] == (1225 + 1163) / 2
    assert found["elo_contests"] == 2.0
    assert found["elo_standard_error"] == pytest.approx(abs(1225 - 1163) / 2, rel=1e-12)
    assert found["elo_percentile"] == 25.0 if found["elo"] < 1200 else 75.0
    assert found["contests_left_out"] == {"5": "no stored standings"}
    assert found["ratings_table"] == "mine.json"
    assert found["orders"]["low"] <= found["orders"]["mean"] <= found["orders"]["high"]
    assert found["orders"]["low"] < found["orders"]["high"]  # an early success is worth more
    assert "elo" not in ratings([tried("5A", T)], contests, {}, None, "")
    assert math.isfinite(found["elo"])
