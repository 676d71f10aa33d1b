"""A model's CodeForces rating from stored standings, after CodeElo (arXiv 2501.01257, `calc_rating.py`).

A model gets the place among the rated participants that its points would have given it, and the rating at
which a participant would be expected to take that place. A suite's rating is the mean over its contests.
"""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEWEST_ROWS = 200
"""Contests with as many rated participants or fewer are left out, as CodeElo does."""
WRONG_ATTEMPT_POINTS, WRONG_ATTEMPT_MINUTES = 50, 10


@dataclass(frozen=True)
class Contest:
    """The standings of one contest, its rated participants alone."""

    contest_id: str
    rows: tuple[tuple[float, float], ...]
    """(points, penalty) of each participant, best first, as published."""
    ratings: tuple[int, ...]
    """Ratings before the contest, in any order."""
    points: Mapping[str, float | None]
    """Problem ("1971A") -> its points; None where a problem counts 1 and wrong attempts cost minutes."""


def rank_of(points: float, penalty: float, rows: Sequence[tuple[float, float]]) -> int:
    """The place that a score takes, counted from 0: that of the first row which is strictly worse.

    Equal rows stand before the model. Example: of the rows 30, 20, 20, 10 a score of 20 takes place 3.
    """
    for place, (theirs, minutes) in enumerate(rows):
        if theirs < points or (theirs == points and minutes > penalty):
            return place
    return len(rows)


def rating_at(rank: int, ratings: Sequence[int]) -> int:
    """The rating whose expected place is `rank`, by bisection on whole numbers up to the highest + 100.

    The expected place is 1 + sum over participants of 1 / (1 + 10^((r - theirs) / 400)): counted from 1,
    while ranks are counted from 0. CodeElo has it so, and figures can be compared only with that rule.
    """
    counts = Counter(ratings)
    low, high = 0, max(ratings) + 100
    while high - low > 1:
        middle = (low + high) // 2
        expected = 1 + math.fsum(n / (1 + 10 ** ((middle - own) / 400)) for own, n in counts.items())
        low, high = (low, middle) if expected < rank else (middle, high)
    return low


def score(contest: Contest, attempts: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """(points, penalty) of a model from its attempts at the contest's problems, in order.

    Attempts end with the first that is accepted; each wrong one before it costs 50 points of the problem, or
    10 minutes where problems have no points. There is no loss for time.
    """
    points = penalty = 0.0
    for problem, worth in contest.points.items():
        tries = list(attempts.get(problem, ()))
        if True not in tries:
            continue
        wrong = tries.index(True)
        if worth is None:
            points, penalty = points + 1, penalty + WRONG_ATTEMPT_MINUTES * wrong
        else:
            points += max(0.0, worth - WRONG_ATTEMPT_POINTS * wrong)
    return points, penalty


def rating(contest: Contest, attempts: Mapping[str, Sequence[bool]]) -> int:
    """The rating that these attempts would have earned in the contest."""
    return rating_at(rank_of(*score(contest, attempts), contest.rows), contest.ratings)


def percentile(value: float, table: Mapping[int, int]) -> float:
    """Percent of the people in a table {rating: count} whose rating is lower, to one decimal."""
    order = sorted(table)
    below = sum(table[one] for one in order[: bisect.bisect_left(order, value)])
    return round(100 * below / sum(table.values()), 1)


def read_table(path: Path) -> dict[int, int]:
    """Ratings of people: a JSON object {rating: count}, or a JSON list of ratings. Raises ValueError."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, (list, dict)) or not found:
        raise ValueError(f"{path} must be a JSON object {{rating: count}} or a list of ratings")
    if isinstance(found, list):
        return dict(Counter(int(one) for one in found))
    return {int(one): int(count) for one, count in found.items()}


def read_contests(path: Path, wanted: Sequence[str]) -> tuple[dict[str, Contest], dict[str, str]]:
    """(contests by id, why others of `wanted` are left out).

    `path` is a JSON object {contest id: {standings, rating_changes}} with the answers of the site's API, or a
    folder with one such file CONTEST.json for each contest.
    """
    contests, left_out = {}, {}
    stored = {} if path.is_dir() else json.loads(path.read_text(encoding="utf-8"))
    for contest_id in wanted:
        file = path / f"{contest_id}.json"
        if path.is_dir() and file.is_file():
            stored = {contest_id: json.loads(file.read_text(encoding="utf-8"))}
        if contest_id not in stored:
            left_out[contest_id] = "no stored standings"
            continue
        contest = read_contest(contest_id, stored[contest_id])
        if contest is None:
            left_out[contest_id] = f"{FEWEST_ROWS} rated participants or fewer, or an answer that failed"
        else:
            contests[contest_id] = contest
    return contests, left_out


def read_contest(contest_id: str, stored: Mapping[str, Any]) -> Contest | None:
    """A contest from the site's answers `contest.standings` and `contest.ratingChanges`.

    Rows of people who were not rated are dropped. None where too few are left, or an answer is no success.
    """
    standings, changes = stored.get("standings", {}), stored.get("rating_changes", {})
    if standings.get("status") != "OK" or changes.get("status") != "OK":
        return None
    ratings = {change["handle"]: int(change["oldRating"]) for change in changes["result"]}
    rows = [(_handle(row), row) for row in standings["result"]["rows"]]
    rows = [(handle, row) for handle, row in rows if handle in ratings]
    if len(rows) <= FEWEST_ROWS:
        return None
    return Contest(
        contest_id,
        tuple((float(row["points"]), float(row["penalty"])) for _, row in rows),
        tuple(ratings[handle] for handle, _ in rows),
        {
            f"{problem.get('contestId', contest_id)}{problem['index']}": problem.get("points")
            for problem in standings["result"]["problems"]
        },
    )


def _handle(row: Mapping[str, Any]) -> str:
    return str(row["party"]["members"][0]["handle"])
