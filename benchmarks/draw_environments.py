"""Draws what runs with environments have learnt, one panel for each name before the colon.

    python benchmarks/draw_environments.py --to curves.png \\
        "calculator:with the tool=runs/calculator" "calculator:without=runs/calculator_without" \\
        "guess:=runs/guess" "Python:=runs/python_tool"

Lines with dots are held-out episodes (greedy), thin ones those of training (sampled), dotted ones the calls
of tools per episode of training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gspo_dist.metrics.jsonl import read_jsonl

LINES = {
    "eval/heldout/accuracy": ("held out", {"marker": "o", "markersize": 4, "linewidth": 1.6}),
    "rollout/reward_mean": ("training", {"linewidth": 0.8}),
    "reward/tool_calls": ("calls per episode", {"linewidth": 1.2, "linestyle": ":"}),
}
"""What is drawn of a run: key -> (label, style)."""


def draw(panels: dict[str, dict[str, Path]], to: Path) -> dict[str, tuple[float, float]]:
    """Writes a PNG. Returns the held-out accuracy before and after of every run, by its label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    found = {}
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        for number, (label, folder) in enumerate(runs.items()):
            rows = read_jsonl(folder / "metrics.jsonl")
            for key, (name, style) in LINES.items():
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    own: dict[str, Any] = {**style, "color": f"C{number}"}
                    axis.plot(*zip(*points, strict=True), label=f"{name} {label}".strip(), **own)
                if points and key.startswith("eval/"):
                    found[f"{title} {label}".strip()] = points[0][1], points[-1][1]
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(-0.02, 1.05)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(to, dpi=90, format="png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, help="the PNG")
    parser.add_argument("runs", nargs="+", metavar="PANEL:LABEL=RUN_DIR")
    options = parser.parse_args()
    panels: dict[str, dict[str, Path]] = {}
    for run in options.runs:
        name, _, folder = run.partition("=")
        panel, _, label = name.partition(":")
        panels.setdefault(panel, {})[label] = Path(folder)
    for name, (before, after) in draw(panels, options.to).items():
        print(f"{name}: {before:.1%} -> {after:.1%} held out")


if __name__ == "__main__":
    main()
