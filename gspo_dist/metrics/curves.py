"""curves.png: what a run did, in six panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gspo_dist.files import replacing


@dataclass(frozen=True)
class Panel:
    """One set of axes, drawn against the step."""

    title: str
    """Over the panel."""
    keys: tuple[str, ...]
    """Metrics, one line each."""
    logarithmic: bool = False
    """Whether the y axis is logarithmic where all values are positive."""


PANELS = (
    Panel("held-out accuracy", ("eval/heldout/accuracy",)),
    Panel("training reward", ("rollout/reward_mean",)),
    Panel(
        "clip fraction by sign of the advantage",
        ("objective/clip_fraction_positive", "objective/clip_fraction_negative"),
    ),
    Panel("mismatch engine / learner (k3, nats per token)", ("mismatch/k3_kl",), logarithmic=True),
    Panel("entropy (nats per token)", ("objective/entropy",)),
    Panel("time per step (s)", ("time/collect_s", "time/old_logprobs_s", "time/update_s", "time/sync_s")),
)


def draw_curves(rows: Sequence[Mapping[str, float | None]], path: Path, title: str = "") -> None:
    """Writes a PNG of PANELS; rows are those of metrics.jsonl, where None was not finite.

    May be called again: the file is replaced at once. Raises OSError when it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for key in panel.keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                marker = "o" if key.startswith("eval/") else None  # few points, far apart
                label = key.split("/", 1)[1]
                axis.plot(steps, values, label=label, marker=marker, markersize=4, linewidth=1.3)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if panel.logarithmic and axis.lines and all(min(line.get_ydata()) > 0 for line in axis.lines):
            axis.set_yscale("log")
        if len(panel.keys) > 1 and axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
