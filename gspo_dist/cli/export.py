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
        help="also start the run's learner, and compare its log-probs with those of transformers over the "
        "folder; default: where that is cheap, on a CPU with a model of up to 1 GiB",
    )
    options = parser.parse_args(args)
    guarded(lambda: _export(options.run.expanduser().resolve(), options.to.expanduser(), options.probe))


def _export(run_dir: Path, target: Path, probe: bool | None) -> None:
    from gspo_dist.trainer.export import export_run

    done = export_run(run_dir, target, probe=probe)
    compared = f"; log-probs are the learner's to {done['mean_abs']:.1e} nats" if "mean_abs" in done else ""
    print(f"{done['folder']}: {done['tensors']} tensors after step {done['step']}, read back{compared}")
