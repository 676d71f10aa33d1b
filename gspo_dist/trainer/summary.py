"""The end of a run: pictures, the summary, and the sinks closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gspo_dist.metrics.curves import draw_curves
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.sinks import going_on_without
from gspo_dist.trainer.run import Run

ACCURACY = "eval/heldout/accuracy"


def finish(run: Run) -> dict[str, object]:
    """Draws the curves and heat maps, writes the summary, closes the sinks; returns the summary."""
    rows = read_jsonl(run.run_dir / "metrics.jsonl")
    curves = run.run_dir / "curves.png"
    pictures: list[Path] = []
    with going_on_without(str(curves)):
        draw_curves(rows, curves, title=run.run_dir.name)
        pictures.append(curves)
    with going_on_without("the heat maps of routing flips"):
        pictures += run.flips.draw(run.run_dir)
    for picture in pictures:
        run.sinks.image(picture.stem, picture)
    speeds = [row["perf/tokens_per_s"] for row in rows if "perf/tokens_per_s" in row]
    summary: dict[str, object] = {
        "steps": run.config.steps,
        "policy_version": run.learner.policy_version,
        "completion_tokens": run.tokens_seen,
        "seconds": run.seconds,
        "tokens_per_s_median": float(np.median(speeds)),
        "peak_memory_bytes": run.pool.peak_memory() | run.learner.peak_memory(),
        "checkpoint": str(run.last_checkpoint) if run.last_checkpoint else None,
    }
    if run.last_evaluation:
        summary["heldout_before"] = run.first_evaluation[ACCURACY]
        summary["heldout_after"] = run.last_evaluation[ACCURACY]
    run.sinks.close(summary)
    return summary
