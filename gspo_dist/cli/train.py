"""`gspo train`: one run, as a hydra application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_dist.cli.compose import run_as_application
from gspo_dist.cli.exits import guarded
from gspo_dist.config import RunConfig


def main(args: Sequence[str]) -> None:
    """Trains, then prints where the results are and what they say."""
    run_as_application("gspo train", args, lambda config: guarded(lambda: _train(config)))


def _train(config: RunConfig) -> None:
    from gspo_dist.trainer.restarts import train_run

    print_summary(*train_run(config))


def print_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """The last lines of a run: its folder, its accuracy before and after, its speed."""
    print(f"\nrun folder   {run_dir}  (metrics.jsonl, curves.png, samples.jsonl, summary.json)")
    if "heldout_before" in summary:
        before, after = summary["heldout_before"], summary["heldout_after"]
        print(f"held-out accuracy   {before:.1%} -> {after:.1%}   ({100 * (after - before):+.1f} points)")
    print(
        f"{summary['completion_tokens']:,} completion tokens in {summary['seconds'] / 60:.1f} min, "
        f"median {summary['tokens_per_s_median']:,.0f} tokens/s per step"
    )
