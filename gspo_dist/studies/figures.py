"""The pictures of a study's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.studies.analysis import HELDOUT, REWARD, RunData, band, estimate
from gspo_dist.studies.study import Study

COLOURS = ("#1b6ca8", "#7fb7e6", "#c23b22", "#e8963a", "#6a994e", "#7b4ea3", "#555555", "#c9a227")
TIME_PARTS = ("collect", "reward", "old_logprobs", "update", "sync", "flips", "pack", "other")


def _plt() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def by_arm(study: Study, runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """The runs of each arm that has any, in the study's order."""
    return {arm: found for arm in study.arms if (found := [r for r in runs if r.arm == arm])}


def draw_all(study: Study, runs: Sequence[RunData], folder: Path) -> dict[str, Path]:
    """Writes every figure that has data; title -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = by_arm(study, runs)
    makers: Mapping[str, tuple[str, Callable[[Any, dict[str, list[RunData]]], bool]]] = {
        "Held-out accuracy and training reward": ("learning.png", _learning),
        "Clipped tokens (logarithmic)": ("clipping.png", _clipping),
        "The first mini-batch: offset and clipping": ("contract.png", _contract),
        "Routing flips and mismatch": ("routing.png", _routing),
        "Entropy, length, gradient norm": ("health.png", _health),
        "Time of a step and peak memory": ("cost.png", _cost),
    }
    out = {}
    plt = _plt()
    for title, (name, make) in makers.items():
        figure = plt.figure(figsize=(14, 8 if make is _learning else 4.2), layout="constrained")
        if make(figure, arms):
            figure.savefig(folder / name, dpi=110)
            out[title] = folder / name
        plt.close(figure)
    return out


def _line(
    axis: Any,
    arms: dict[str, list[RunData]],
    key: str,
    x: Callable[[list[RunData], np.ndarray], np.ndarray] | None = None,
) -> bool:
    """One line an arm, mean over seeds with a band of one standard error; False where no arm has the metric. Each line is
    thinner than the one before it, so that equal ones show."""
    drawn = False
    widths = np.linspace(3.0, 1.2, len(arms))
    for width, colour, (arm, runs) in zip(widths, COLOURS * 4, arms.items(), strict=False):
        steps, mean, error = band(runs, key)
        if not len(steps):
            continue
        place = steps if x is None else x(runs, steps)
        axis.plot(
            place,
            mean,
            color=colour,
            label=arm,
            linewidth=width,
            marker="o" if key == HELDOUT else None,
            markersize=3,
        )
        axis.fill_between(place, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        drawn = True
    axis.grid(alpha=0.25)
    return drawn


def _running(key: str) -> Callable[[list[RunData], np.ndarray], np.ndarray]:
    """x-axis: the mean over seeds of a running total (tokens) at given steps."""

    def at(runs: list[RunData], steps: np.ndarray) -> np.ndarray:
        rows = [{int(s): v for s, v in zip(*run.series(key), strict=True)} | {0: 0.0} for run in runs]
        return np.array([np.mean([r.get(int(s), np.nan) for r in rows]) for s in steps])

    return at


def _minutes(runs: list[RunData], steps: np.ndarray) -> np.ndarray:
    """x-axis: minutes of training steps (evaluation and flip measurements are not counted)."""
    totals = []
    for run in runs:
        s, t = run.series("time/step_s")
        _, f = run.series("time/flips_s")
        spent = np.concatenate([[0.0], np.cumsum(t - (f if len(f) == len(t) else 0.0))]) / 60
        totals.append(np.interp(steps, np.concatenate([[0.0], s]), spent))
    return np.mean(totals, 0)


def _learning(figure: Any, arms: dict[str, list[RunData]]) -> bool:
    axes = figure.subplots(2, 3, sharey="row")
    against = {
        "step": None,
        "completion tokens": _running("rollout/completion_tokens_total"),
        "minutes of training": _minutes,
    }
    drawn = []
    for row, (key, title) in zip(
        axes, ((HELDOUT, "held-out accuracy"), (REWARD, "training reward")), strict=True
    ):
        for axis, (label, x) in zip(row, against.items(), strict=True):
            drawn.append(_line(axis, arms, key, x))
            axis.set_xlabel(label)
            axis.set_title(f"{title} against {label}", fontsize=10)
        row[1].xaxis.set_major_formatter(_thousands)
    _legend(axes[0])
    return any(drawn)


def _legend(axes: Any) -> None:
    """On the first of the axes that has lines."""
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
            return


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value else "0"


def _clipping(figure: Any, arms: dict[str, list[RunData]]) -> bool:
    axes = figure.subplots(1, 3, sharey=True)
    keys = ("objective/clip_fraction", "objective/clip_fraction_positive", "objective/clip_fraction_negative")
    drawn = [_line(axis, arms, key) for axis, key in zip(axes, keys, strict=True)]
    for axis, title in zip(axes, ("all tokens", "positive advantage", "negative advantage"), strict=True):
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(0, 1)
        axis.set_title(f"share of tokens clipped: {title}", fontsize=10)
        axis.set_xlabel("step")
    _legend(axes)
    return any(drawn)


def _contract(figure: Any, arms: dict[str, list[RunData]]) -> bool:
    axes = figure.subplots(1, 3)
    keys = (
        "contract/offset_clip_widths",
        "objective/mini_batch_0/clip_fraction_negative",
        "objective/mini_batch_0/clip_fraction_positive",
    )
    titles = (
        "offset of the mean log ratio (clip widths)",
        "clipped in mini-batch 0: A < 0",
        "clipped in mini-batch 0: A > 0",
    )
    drawn = [_line(axis, arms, key) for axis, key in zip(axes, keys, strict=True)]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    _legend(axes)
    return any(drawn)


def _routing(figure: Any, arms: dict[str, list[RunData]]) -> bool:
    axes = figure.subplots(1, 4)
    keys = ("routing/engine/flip_fraction", "routing/update/flip_fraction", "mismatch/k3_kl")
    titles = (
        "experts differ: engine / learner",
        "experts differ: before / after a step",
        "mismatch k3 (nats a token)",
    )
    drawn = [_line(axis, arms, key) for axis, key in zip(axes, keys, strict=False)]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    if drawn[2]:
        axes[2].set_yscale("log")
    drawn.append(_layers(axes[3], arms))
    _legend(axes)
    return any(drawn)


def _layers(axis: Any, arms: dict[str, list[RunData]]) -> bool:
    """Mean flip rate after a step's updates, by layer."""
    drawn = False
    for colour, (arm, runs) in zip(COLOURS * 4, arms.items(), strict=False):
        keys = sorted(
            {
                k
                for r in runs
                for row in r.rows
                for k in row
                if k.startswith("routing/update/flip_fraction/layer_")
            }
        )
        if keys:
            axis.plot(
                range(len(keys)),
                [estimate([r.mean(k) for r in runs]).mean for k in keys],
                color=colour,
                label=arm,
                marker="o",
            )
            drawn = True
    axis.set_title("experts differ after a step, by MoE layer", fontsize=10)
    axis.set_xlabel("MoE layer")
    axis.grid(alpha=0.25)
    return drawn


def _health(figure: Any, arms: dict[str, list[RunData]]) -> bool:
    axes = figure.subplots(1, 3)
    keys = ("objective/entropy", "rollout/completion_tokens_mean", "learner/grad_norm")
    drawn = [_line(axis, arms, key) for axis, key in zip(axes, keys, strict=True)]
    for axis, title in zip(
        axes, ("entropy (nats a token)", "completion length (tokens)", "gradient norm"), strict=True
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    _legend(axes)
    return any(drawn)


def _cost(figure: Any, arms: dict[str, list[RunData]]) -> bool:
    axes = figure.subplots(1, 2)
    names = list(arms)
    left = np.zeros(len(names))
    for part in TIME_PARTS:
        seconds = np.array([estimate([r.mean(f"time/{part}_s") for r in arms[a]]).mean for a in names])
        seconds = np.nan_to_num(seconds)
        axes[0].barh(names, seconds, left=left, label=part)
        left += seconds
    axes[0].set_title("seconds of a step", fontsize=10)
    axes[0].legend(fontsize=8, ncols=2)
    memory = [estimate([peak_memory(r) for r in arms[a]]).mean / 2**30 for a in names]
    axes[1].barh(names, memory, color="#7fb7e6")
    axes[1].set_title("peak resident memory of the run's processes (GiB)", fontsize=10)
    for axis in axes:
        axis.invert_yaxis()
    return bool(left.any())


def peak_memory(run: RunData) -> float:
    """Sum of the peak resident bytes of a finished run's processes; nan for one without a summary."""
    if run.summary is None:
        return float("nan")
    return float(sum(p.get("host", 0) for p in run.summary["peak_memory_bytes"].values()))
