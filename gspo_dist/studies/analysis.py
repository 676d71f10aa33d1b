"""What the runs of a study say: curves over seeds, final values with confidence intervals, paired tests, collapse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.metrics.sinks import read_jsonl
from gspo_dist.studies.study import Study

HELDOUT = "eval/heldout/accuracy"
REWARD = "rollout/reward_mean"


@dataclass(frozen=True)
class RunData:
    """One run: its status, its rows (one a step), its summary (None when it did not finish), and what its process took
    (nan while it runs)."""

    arm: str
    seed: int
    status: str
    reason: str
    rows: list[dict[str, Any]]
    summary: Mapping[str, Any] | None
    seconds: float = math.nan

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows that have `key`."""
        points = [(r["step"], r[key]) for r in self.rows if r.get(key) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, float), np.array(values, float)

    def mean(self, key: str, last: int | None = None) -> float:
        """Mean over the run's steps (the last `last` of them); nan where it was never logged."""
        values = self.series(key)[1]
        values = values[-last:] if last else values
        return float(values.mean()) if len(values) else math.nan

    def final(self, key: str) -> float:
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan


def final_accuracy(run: RunData) -> float:
    """Held-out accuracy at the end; a collapsed run counts with what it had there."""
    return run.final(HELDOUT)


def mean_reward(run: RunData) -> float:
    """Training reward over all steps."""
    return run.mean(REWARD)


def load_runs(study: Study) -> list[RunData]:
    """Every run of the study that wrote anything."""
    out = []
    for arm, seed in study.runs:
        folder = study.run_dir(arm, seed)
        rows = read_jsonl(folder / "metrics.jsonl")
        if not rows:
            continue
        status = _json(folder / "status.json") or {"status": "running", "reason": ""}
        summary = _json(folder / "summary.json")
        seconds = status.get("seconds", math.nan)
        out.append(RunData(arm, seed, status["status"], status["reason"], rows, summary, seconds))
    return out


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with a two-sided 95% confidence interval (Student's t; infinite for one seed)."""

    mean: float
    half_width: float
    n: int

    def text(self, form: str = "{:.3f}") -> str:
        if self.n == 0 or math.isnan(self.mean):
            return "-"
        if self.n == 1:
            return form.format(self.mean)
        return f"{form.format(self.mean)} ± {form.replace('+', '').format(self.half_width)}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t-interval of the finite values."""
    from scipy import stats

    x = np.array([v for v in values if math.isfinite(v)], float)
    if not len(x):
        return Estimate(math.nan, math.nan, 0)
    if len(x) == 1:
        return Estimate(float(x[0]), math.inf, 1)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(float(x.mean()), half, len(x))


@dataclass(frozen=True)
class Paired:
    """Difference arm - reference over the seeds both have: mean, 95% interval, p of the paired t-test (nan for fewer
    than two seeds, which have no spread to test against)."""

    difference: Estimate
    p: float

    @property
    def testable(self) -> bool:
        return self.difference.n >= 2

    @property
    def significant(self) -> bool:
        return self.p < 0.05

    def text(self, scale: float = 1.0, unit: str = "") -> str:
        d = self.difference
        if d.n == 0 or math.isnan(d.mean):
            return "-"
        if d.n == 1:
            return f"{scale * d.mean:+.1f}{unit} (one seed)"
        return f"{scale * d.mean:+.1f} ± {scale * d.half_width:.1f}{unit} (p = {self.p:.2g})"


def paired(runs: Sequence[RunData], arm: str, reference: str, value: Any) -> Paired:
    """Compares `value(run)` of two arms seed by seed."""
    from scipy import stats

    a = {r.seed: value(r) for r in runs if r.arm == arm}
    b = {r.seed: value(r) for r in runs if r.arm == reference}
    seeds = [s for s in sorted(a.keys() & b.keys()) if math.isfinite(a[s]) and math.isfinite(b[s])]
    d = np.array([a[s] - b[s] for s in seeds], float)
    if len(d) < 2:
        return Paired(estimate(d), math.nan)
    if float(d.std(ddof=1)) == 0.0:
        return Paired(estimate(d), 0.0 if d.any() else 1.0)
    return Paired(estimate(d), float(stats.ttest_1samp(d, 0.0).pvalue))


COLLAPSE_RULE = (
    "a run collapsed when it diverged (a loss, gradient or log-prob that is not finite), or when its training reward (mean over five steps) fell below half of "
    "its own earlier best and stayed there to the end"
)


def collapse_step(run: RunData) -> int | None:
    """The step at which the run collapsed by COLLAPSE_RULE, or None."""
    steps, reward = run.series(REWARD)
    if run.status == "diverged":
        return int(steps[-1]) if len(steps) else 0
    if len(reward) < 10:
        return None
    smooth = np.convolve(reward, np.ones(5) / 5, "valid")
    best = np.maximum.accumulate(smooth)
    below = smooth < 0.5 * best
    if not below[-1]:
        return None
    recovered = np.flatnonzero(~below)
    start = int(recovered[-1]) + 1 if len(recovered) else 0
    return int(steps[start + 4])


def band(runs: Sequence[RunData], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, standard error) over seeds at the steps that every run of the arm has."""
    series = [dict(zip(*map(np.ndarray.tolist, run.series(key)), strict=True)) for run in runs]
    series = [s for s in series if s]
    if not series:
        return np.array([]), np.array([]), np.array([])
    steps = sorted(set.intersection(*(set(s) for s in series)))
    values = np.array([[s[t] for t in steps] for s in series])
    error = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), error
