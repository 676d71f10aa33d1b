"""curves.png: what a run did, in six panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("held-out accuracy", ("eval/heldout/accuracy",), False),
    ("training reward", ("rollout/reward_mean",), False),
    (
        "clip fraction by sign of the advantage",
        ("objective/clip_fraction_positive", "objective/clip_fraction_negative"),
        False,
    ),
    ("mismatch engine / learner (k3, nats a token)", ("mismatch/k3_kl",), True),
    ("entropy (nats a token)", ("objective/entropy",), False),
    ("time of a step (s)", ("time/collect_s", "time/old_logprobs_s", "time/update_s", "time/sync_s"), False),
)


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Draws the panels of PANELS against the step; rows are those of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (name, keys, logarithmic) in zip(axes.flat, PANELS, strict=True):
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                marker = "o" if key.startswith("eval/") else None
                axis.plot(
                    steps, values, label=key.split("/", 1)[1], marker=marker, markersize=4, linewidth=1.3
                )
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if logarithmic and axis.lines and all(min(line.get_ydata()) > 0 for line in axis.lines):
            axis.set_yscale("log")
        if len(keys) > 1 and axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
