"""What the runs of a study say: curves over seeds, intervals of final values, paired tests, collapses."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.studies.ending import read_ending
from gspo_dist.studies.study import Study

log = logging.getLogger(__name__)

HELDOUT = "eval/heldout/accuracy"
REWARD = "rollout/reward_mean"


@dataclass(frozen=True)
class RunData:
    """What one run has written so far."""

    arm: str
    """Name of its settings in the study."""
    seed: int
    """Of its prompts, sampling and initialisation."""
    status: str
    """done, diverged, died, or running."""
    reason: str
    """Why it failed; empty unless it did."""
    rows: list[dict[str, Any]]
    """metrics.jsonl: one row per step. A value is None where it was not finite."""
    summary: Mapping[str, Any] | None
    """summary.json, or None for a run that did not finish."""
    seconds: float = math.nan
    """What its process took; nan while it runs."""

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows that have `key`, each [R] float64."""
        points = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, float), np.array(values, float)

    def mean(self, key: str, last: int | None = None) -> float:
        """Mean over the run's steps (the last `last` of them); nan where it was never logged."""
        values = self.series(key)[1]
        values = values[-last:] if last else values
        return float(values.mean()) if len(values) else math.nan

    def final(self, key: str) -> float:
        """The last value; nan where it was never logged."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan


RunValue = Callable[[RunData], float]
"""One number of one run: what seeds are compared by."""


def final_accuracy(run: RunData) -> float:
    """Held-out accuracy at the end; a collapsed run counts with what it had there."""
    return run.final(HELDOUT)


def mean_reward(run: RunData) -> float:
    """Training reward over all steps."""
    return run.mean(REWARD)


def load_runs(study: Study) -> list[RunData]:
    """Every run of the study that wrote a whole row. A torn file is said in the log and counts as absent."""
    out = []
    for arm, seed in study.runs:
        folder = study.run_dir(arm, seed)
        rows = read_jsonl(folder / "metrics.jsonl")
        if not rows:
            continue
        ending = read_ending(folder)
        status, reason, seconds = (
            (ending.status, ending.reason, ending.seconds) if ending else ("running", "", math.nan)
        )
        out.append(RunData(arm, seed, status, reason, rows, _read_summary(folder), seconds))
    return out


def _read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a full disk or a killed machine; the report can do without
        log.warning("%s is torn: this run's memory is left out of the report", path)
        return None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with a two-sided 95% confidence interval (Student's t)."""

    mean: float
    """nan for no values."""
    half_width: float
    """Of the interval; infinite for one value, nan for none."""
    n: int
    """Number of finite values."""

    def text(self, form: str = "{:.3f}") -> str:
        """`mean ± half width`, the mean alone for one value, `-` for none."""
        if self.n == 0 or math.isnan(self.mean):
            return "-"
        if self.n == 1:
            return form.format(self.mean)
        # A sign belongs to the mean only: "+1.2 ± 0.3".
        return f"{form.format(self.mean)} ± {form.replace('+', '').format(self.half_width)}"


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and t-interval of the finite ones of `values`."""
    from scipy import stats

    x = np.array([value for value in values if math.isfinite(value)], float)
    if not len(x):
        return Estimate(math.nan, math.nan, 0)
    if len(x) == 1:
        return Estimate(float(x[0]), math.inf, 1)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(float(x.mean()), half, len(x))


@dataclass(frozen=True)
class Paired:
    """Two arms compared seed by seed: what seeds share cancels."""

    difference: Estimate
    """Arm minus reference, over the seeds that both have."""
    p: float
    """Of the paired t-test. nan for fewer than two seeds, which have no spread to test against."""

    @property
    def testable(self) -> bool:
        """Whether there are seeds enough for the test."""
        return self.difference.n >= 2

    @property
    def significant(self) -> bool:
        """Whether p is below 0.05."""
        return self.p < 0.05

    def text(self, scale: float = 1.0, unit: str = "") -> str:
        """The difference times `scale` with its interval and p, `-` where no seed has both arms."""
        d = self.difference
        if d.n == 0 or math.isnan(d.mean):
            return "-"
        if d.n == 1:
            return f"{scale * d.mean:+.1f}{unit} (one seed)"
        return f"{scale * d.mean:+.1f} ± {scale * d.half_width:.1f}{unit} (p = {self.p:.2g})"


def paired(runs: Sequence[RunData], arm: str, reference: str, value: RunValue) -> Paired:
    """Compares `value(run)` of two arms over the seeds for which it is finite in both."""
    from scipy import stats

    a = {run.seed: value(run) for run in runs if run.arm == arm}
    b = {run.seed: value(run) for run in runs if run.arm == reference}
    seeds = [s for s in sorted(a.keys() & b.keys()) if math.isfinite(a[s]) and math.isfinite(b[s])]
    d = np.array([a[s] - b[s] for s in seeds], float)
    if len(d) < 2:
        return Paired(estimate(d), math.nan)
    if float(d.std(ddof=1)) == 0.0:  # the test would divide by this
        return Paired(estimate(d), 0.0 if d.any() else 1.0)
    return Paired(estimate(d), float(stats.ttest_1samp(d, 0.0).pvalue))


COLLAPSE_RULE = (
    "a run collapsed when it diverged (a loss, gradient or log-prob that is not finite), or when its "
    "training reward (mean over five steps) fell below half of its own earlier best and stayed there to the "
    "end"
)


def collapse_step(run: RunData) -> int | None:
    """The step at which the run collapsed by COLLAPSE_RULE, or None.

    Example: reward 0.5 in steps 0 to 9 and 0.1 from step 10 on. The mean of steps 9 to 13 is 0.18, the first
    below 0.25, so the step is 13.
    """
    steps, reward = run.series(REWARD)
    if run.status == "diverged":
        return int(steps[-1]) if len(steps) else 0
    if len(reward) < 10:  # two windows: one to be best, one to have fallen
        return None
    smooth = np.convolve(reward, np.ones(5) / 5, "valid")
    best = np.maximum.accumulate(smooth)
    below = smooth < 0.5 * best
    if not below[-1]:
        return None
    recovered = np.flatnonzero(~below)
    start = int(recovered[-1]) + 1 if len(recovered) else 0
    return int(steps[start + 4])  # window i ends with step i + 4


def band(runs: Sequence[RunData], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, standard error), each [R], over seeds at the steps that every run of the arm has."""
    series = [dict(zip(*map(np.ndarray.tolist, run.series(key)), strict=True)) for run in runs]
    series = [one for one in series if one]
    if not series:
        return np.array([]), np.array([]), np.array([])
    steps = sorted(set.intersection(*(set(one) for one in series)))
    values = np.array([[one[step] for step in steps] for one in series])
    error = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), error
