"""`gspo export`: a run's newest checkpoint as an HF folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.exits import guarded


def main(args: Sequence[str]) -> None:
    """Writes the folder and says what is in it."""
    parser = argparse.ArgumentParser(
        "gspo export", description="Writes a run's newest checkpoint as an HF folder."
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--to", required=True, type=Path, help="new or empty folder")
    options = parser.parse_args(args)
    guarded(lambda: _export(options.run.expanduser().resolve(), options.to.expanduser()))


def _export(run_dir: Path, target: Path) -> None:
    from gspo_dist.trainer.export import export_run

    done = export_run(run_dir, target)
    print(
        f"{done['folder']}: {done['tensors']} tensors after step {done['step']}, read back; log-probs are "
        f"the learner's to {done['mean_abs']:.1e} nats"
    )
