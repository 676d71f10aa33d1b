"""Two results of one suite compared: problem by problem, with a confidence interval and a test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gspo_dist.evaluation.suite import clustered_standard_error

FLIPS = 100_000
"""Random signs of the permutation test where there are too many to try all."""
EXACT_UP_TO = 16
"""So many differing problems are tested with all their signs."""


class Comparison(NamedTuple):
    """What two results say of each other."""

    suite: str
    problems: int
    """Problems of both."""
    first: float
    """Share of right samples, mean over those problems."""
    second: float
    difference: float
    """second - first."""
    low: float
    """95% confidence interval of the difference, by Student's t over problems."""
    high: float
    p_t: float
    """Two-sided p of the paired t-test; nan where all differences are equal."""
    p_permutation: float
    """Two-sided p of the sign-flip permutation test, which assumes no shape."""
    better: int
    """Problems that the second solves more often."""
    worse: int


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Compares two contents of result.json.

    Problems are the independent draws: samples of one problem rise and fall together. Each problem's share of
    right samples is paired with the other model's.

    Raises ValueError for different suites, and for fewer than two common problems.
    """
    if first["suite"] != second["suite"]:
        raise ValueError(f"two results of one suite are compared: got {first['suite']} and {second['suite']}")
    shares = [_shares(one) for one in (first, second)]
    common = [problem for problem in shares[0] if problem in shares[1]]
    if len(common) < 2:
        raise ValueError(
            f"two results must share at least two problems: got {len(common)} of {len(shares[0])} and "
            f"{len(shares[1])}; were they made from one file?"
        )
    a, b = (np.array([own[problem] for problem in common]) for own in shares)
    return _paired(str(first["suite"]), a, b)


def _paired(suite: str, a: np.ndarray, b: np.ndarray) -> Comparison:
    from scipy import stats

    differences = b - a
    n, mean, error = len(a), float(differences.mean()), clustered_standard_error(differences.tolist())
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p_t = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else math.nan
    return Comparison(
        suite,
        n,
        float(a.mean()),
        float(b.mean()),
        mean,
        mean - half,
        mean + half,
        p_t,
        sign_flip(differences),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
    )


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p that differences whose signs are chance have a sum as far from 0 as this one.

    All signs are tried where few problems differ, else FLIPS random ones (fixed seed), the observed ones
    among them. Example: differences 1, 1, 1 have the sums 3, 1, 1, 1, -1, -1, -1, -3: p is 2 / 8.
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    seen = abs(moved.sum()) - 1e-12
    if len(moved) <= EXACT_UP_TO:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        sums = ((2 * bits - 1) * moved).sum(axis=1)
        return float((abs(sums) >= seen).mean())
    draw, hits, left = np.random.default_rng(0), 1, FLIPS
    while left > 0:
        now = min(left, 5000)
        hits += int((abs((draw.integers(0, 2, (now, len(moved))) * 2 - 1) @ moved) >= seen).sum())
        left -= now
    return hits / (FLIPS + 1)


def _shares(result: Mapping[str, Any]) -> dict[str, float]:
    own: dict[str, list[bool]] = {}
    for sample in result["samples"]:
        own.setdefault(sample["problem"], []).append(sample["correct"])
    return {problem: sum(correct) / len(correct) for problem, correct in own.items()}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Suite -> result of a result.json, or of all below a folder. Raises ValueError where there is none."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("result.json"))
    found = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        found[result["suite"]] = result  # of several steps of a run, the last counts
    if not found:
        raise ValueError(f"{folder} must be a result.json or a folder with some: it has none")
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as text."""
    interval = "difference (95%)"
    lines = [
        f"{'suite':22s} {'problems':>8s} {'first':>7s} {'second':>7s} {interval:>26s}  {'p(t)':6s} p(signs)"
    ]
    for one in comparisons:
        interval = f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"
        lines.append(
            f"{one.suite:22s} {one.problems:8d} {one.first:7.4f} {one.second:7.4f} {interval:>26s}  "
            f"{one.p_t:.4f} {one.p_permutation:.4f}   better {one.better}, worse {one.worse}"
        )
    return "\n".join(lines)
