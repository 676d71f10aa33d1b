"""The pictures of a study's report: lines over steps, one per arm, and bars of cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global pyplot state
from matplotlib.figure import Figure

from gspo_dist.files import replacing
from gspo_dist.studies.analysis import HELDOUT, REWARD, RunData, band, estimate
from gspo_dist.studies.study import Study

log = logging.getLogger(__name__)

Arms = Mapping[str, list[RunData]]
"""Arm -> its runs."""
Place = Callable[[list[RunData], np.ndarray], np.ndarray]
"""(runs of an arm, steps) -> where the steps stand on the x axis."""

Draw = Callable[[Figure, Arms], bool]
"""Draws a picture and says whether any run has its metrics."""

COLOURS = ("#1b6ca8", "#7fb7e6", "#c23b22", "#e8963a", "#6a994e", "#7b4ea3", "#555555", "#c9a227")
"""Of the arms, in their order."""
STYLES = ("-", "--", ":", "-.")
"""Of their lines: the next one each time that the colours begin again."""
INCHES_PER_ARM = 0.25
"""Height that a bar, or a line of the legend, takes."""
TIME_PARTS = ("collect", "reward", "old_logprobs", "update", "sync", "flips", "pack", "other")
"""Of a step: time/PART_s, stacked in this order."""
LAYERS = "routing/update/flip_fraction/layer_"
"""What the keys of one layer's flips start with. The layer's number follows."""


@dataclass(frozen=True)
class Picture:
    """One figure of the report."""

    title: str
    """Heading in the report."""
    name: str
    """File name."""
    draw: Draw
    """What is on it."""
    height: float = 4.2
    """Inches, of 14 across."""


def by_arm(study: Study, runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """The runs of each arm that has any, in the study's order."""
    return {arm: found for arm in study.arms if (found := [r for r in runs if r.arm == arm])}


def draw_all(study: Study, runs: Sequence[RunData], folder: Path) -> dict[str, Path]:
    """Writes every figure that has data to `folder`. Returns title -> path.

    A figure that cannot be drawn or written is said in the log and left out. The report's numbers matter
    more than its pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arms = by_arm(study, runs)
    out = {}
    for picture in PICTURES:
        path = folder / picture.name
        try:
            height = max(picture.height, INCHES_PER_ARM * len(arms))
            figure = Figure(figsize=(14, height), layout="constrained")
            FigureCanvasAgg(figure)
            if picture.draw(figure, arms):
                with replacing(path) as partial:
                    figure.savefig(partial, dpi=110, format="png")
                out[picture.title] = path
        except Exception as error:
            log.warning("%s is left out of the report: %s: %s", path, type(error).__name__, error)
    return out


def _styled(arms: Arms) -> list[tuple[dict[str, Any], str, list[RunData]]]:
    """(colour and style of its line, arm, its runs). No two of 32 arms have the same line."""
    laps = [(divmod(i, len(COLOURS)), arm, runs) for i, (arm, runs) in enumerate(arms.items())]
    return [
        ({"color": COLOURS[colour], "linestyle": STYLES[lap % len(STYLES)]}, arm, runs)
        for (lap, colour), arm, runs in laps
    ]


def _crowded(arms: Arms) -> bool:
    """More arms than colours: their bands would hide the lines, and their legend the panels."""
    return len(arms) > len(COLOURS)


def _line(axis: Axes, arms: Arms, key: str, x: Place | None = None) -> bool:
    """One line per arm, the mean over seeds with a band of one standard error where the arms are few.

    Each line is thinner than the one before it, so that equal ones show. Returns whether any arm has the
    metric at all.
    """
    drawn = False
    widths = np.linspace(3.0, 1.2, len(arms))
    for width, (style, arm, runs) in zip(widths, _styled(arms), strict=True):
        steps, mean, error = band(runs, key)
        if not len(steps):
            continue
        place = steps if x is None else x(runs, steps)
        axis.plot(
            place,
            mean,
            **style,
            label=arm,
            linewidth=width,
            marker="o" if key == HELDOUT else None,
            markersize=3,
        )
        if not _crowded(arms):
            axis.fill_between(
                place, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0
            )
        drawn = True
    axis.grid(alpha=0.25)
    return drawn


def _running(key: str) -> Place:
    """The x axis is a running total (tokens), the mean over seeds."""

    def at(runs: list[RunData], steps: np.ndarray) -> np.ndarray:
        rows = [{int(s): v for s, v in zip(*run.series(key), strict=True)} | {0: 0.0} for run in runs]
        return np.array([np.mean([r.get(int(s), np.nan) for r in rows]) for s in steps])

    return at


def _minutes(runs: list[RunData], steps: np.ndarray) -> np.ndarray:
    """The x axis is minutes of training steps, without evaluation and flip measurements."""
    totals = []
    for run in runs:
        s, t = run.series("time/step_s")
        _, f = run.series("time/flips_s")
        spent = np.concatenate([[0.0], np.cumsum(t - (f if len(f) == len(t) else 0.0))]) / 60
        totals.append(np.interp(steps, np.concatenate([[0.0], s]), spent))
    return np.mean(totals, 0)


# The pictures, and what they share.


def _learning(figure: Figure, arms: Arms) -> bool:
    axes = figure.subplots(2, 3, sharey="row")
    against = {
        "step": None,
        "completion tokens": _running("rollout/completion_tokens_total"),
        "minutes of training": _minutes,
    }
    drawn = []
    measures = ((HELDOUT, "held-out accuracy"), (REWARD, "training reward"))
    for row, (key, title) in zip(axes, measures, strict=True):
        for axis, (label, x) in zip(row, against.items(), strict=True):
            drawn.append(_line(axis, arms, key, x))
            axis.set_xlabel(label)
            axis.set_title(f"{title} against {label}", fontsize=10)
        row[1].xaxis.set_major_formatter(_thousands)
    _legend(figure, axes.flat, arms)
    return any(drawn)


def _legend(figure: Figure, axes: Iterable[Axes], arms: Arms) -> None:
    """Of the first of the axes that has lines: in it where the arms are few, else beside the panels."""
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            if _crowded(arms):
                figure.legend(handles, labels, fontsize=8, loc="outside right upper")
            else:
                axis.legend(fontsize=8)
            return


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value else "0"


def _panels(axes: Sequence[Axes], arms: Arms, metrics: Mapping[str, str]) -> list[bool]:
    """One panel per metric (key -> title) against the step. Returns which of them have data."""
    drawn = []
    for axis, (key, title) in zip(axes, metrics.items(), strict=True):
        drawn.append(_line(axis, arms, key))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    return drawn


def _side_by_side(metrics: Mapping[str, str]) -> Draw:
    """A picture of one panel per metric (key -> title)."""

    def draw(figure: Figure, arms: Arms) -> bool:
        axes = figure.subplots(1, len(metrics))
        drawn = _panels(axes, arms, metrics)
        _legend(figure, axes, arms)
        return any(drawn)

    return draw


def _clipping(figure: Figure, arms: Arms) -> bool:
    axes = figure.subplots(1, 3, sharey=True)
    metrics = {
        "objective/clip_fraction": "share of tokens clipped: all tokens",
        "objective/clip_fraction_positive": "share of tokens clipped: positive advantage",
        "objective/clip_fraction_negative": "share of tokens clipped: negative advantage",
    }
    drawn = _panels(axes, arms, metrics)
    for axis in axes:
        axis.set_yscale("symlog", linthresh=1e-4)  # GRPO's 0.002 and GSPO's 0.4 on one axis, and 0 too
        axis.set_ylim(0, 1)
    _legend(figure, axes, arms)
    return any(drawn)


def _routing(figure: Figure, arms: Arms) -> bool:
    axes = figure.subplots(1, 4)
    metrics = {
        "routing/engine/flip_fraction": "experts differ: engine / learner",
        "routing/update/flip_fraction": "experts differ: before / after a step",
        "mismatch/k3_kl": "mismatch k3 (nats per token)",
    }
    drawn = _panels(axes[:3], arms, metrics)
    if drawn[2]:
        axes[2].set_yscale("log")
    drawn.append(_layers(axes[3], arms))
    _legend(figure, axes, arms)
    return any(drawn)


def _layers(axis: Axes, arms: Arms) -> bool:
    """Mean flip rate after a step's updates, by layer."""
    drawn = False
    for style, arm, runs in _styled(arms):
        found = {key for run in runs for row in run.rows for key in row if key.startswith(LAYERS)}
        keys = sorted(found, key=lambda key: int(key.removeprefix(LAYERS)))
        if keys:
            axis.plot(
                range(len(keys)),
                [estimate([r.mean(k) for r in runs]).mean for k in keys],
                **style,
                label=arm,
                marker="o",
            )
            drawn = True
    axis.set_title("experts differ after a step, by MoE layer", fontsize=10)
    axis.set_xlabel("MoE layer")
    axis.grid(alpha=0.25)
    return drawn


def _cost(figure: Figure, arms: Arms) -> bool:
    axes = figure.subplots(1, 2)
    names = list(arms)
    left = np.zeros(len(names))
    for part in TIME_PARTS:
        seconds = np.array([estimate([r.mean(f"time/{part}_s") for r in arms[a]]).mean for a in names])
        seconds = np.nan_to_num(seconds)
        axes[0].barh(names, seconds, left=left, label=part)
        left += seconds
    axes[0].set_title("seconds per step", fontsize=10)
    axes[0].legend(fontsize=8, ncols=2)
    memory = [estimate([peak_memory(r) for r in arms[a]]).mean / 2**30 for a in names]
    axes[1].barh(names, memory, color="#7fb7e6")
    axes[1].set_title("peak resident memory of the run's processes (GiB)", fontsize=10)
    for axis in axes:
        axis.invert_yaxis()
    return bool(left.any())


def peak_memory(run: RunData) -> float:
    """Sum of the peak resident bytes of a finished run's processes, or nan for one without a summary."""
    if run.summary is None:
        return float("nan")
    return float(sum(p.get("host", 0) for p in run.summary["peak_memory_bytes"].values()))


CONTRACT = {
    "guard/offset_clip_widths": "offset of the mean log ratio (clip widths)",
    "objective/mini_batch_0/clip_fraction_negative": "clipped in mini-batch 0: A < 0",
    "objective/mini_batch_0/clip_fraction_positive": "clipped in mini-batch 0: A > 0",
}
HEALTH = {
    "objective/entropy": "entropy (nats per token)",
    "rollout/completion_tokens_mean": "completion length (tokens)",
    "learner/grad_norm": "gradient norm",
}
PICTURES = (
    Picture("Held-out accuracy and training reward", "learning.png", _learning, height=8),
    Picture("Clipped tokens (logarithmic)", "clipping.png", _clipping),
    Picture("The first mini-batch: offset and clipping", "contract.png", _side_by_side(CONTRACT)),
    Picture("Routing flips and mismatch", "routing.png", _routing),
    Picture("Entropy, length, gradient norm", "health.png", _side_by_side(HEALTH)),
    Picture("Time of a step and peak memory", "cost.png", _cost),
)
"""In the report's order."""
