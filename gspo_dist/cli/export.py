"""`gspo export`: a run's newest checkpoint as an HF folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.exits import guarded


def main(args: Sequence[str]) -> None:
    """Writes the folder and says what is in it."""
    parser = argparse.ArgumentParser(
        "gspo export",
        description="Writes a run's newest checkpoint as an HF folder. It reads the weights in the "
        "checkpoint's files, and needs no GPUs.",
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--to", required=True, type=Path, help="new or empty folder")
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the learner's log-probs, which the checkpoint keeps, with those of transformers over "
        "the folder; it needs memory for the model",
    )
    options = parser.parse_args(args)
    guarded(lambda: _export(options.run.expanduser().resolve(), options.to.expanduser(), options.probe))


def _export(run_dir: Path, target: Path, probe: bool) -> None:
    from gspo_dist.trainer.export import export_run

    done = export_run(run_dir, target, probe=probe)
    told = f"not compared: {done['not_compared']}" if "not_compared" in done else ""
    told = told or f"the learner's to {done['mean_abs']:.1e} nats"
    what = f"{done['tensors']} tensors after step {done['step']}, read back"
    print(f"{done['folder']}: {what}; log-probs {told}")
