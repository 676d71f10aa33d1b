"""`gspo audit`: whether engine and learner give a run's model the same log-probs, and where they part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.exits import guarded


def main(args: Sequence[str]) -> None:
    """Prints how many tokens are equal and the first operator that is not."""
    parser = argparse.ArgumentParser(
        "gspo audit",
        description="Samples from a run's newest checkpoint and compares every token's log-prob with the "
        "learner's. Where they differ, both run the sequence again and the first operator that parts them is "
        "named.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--sequences", type=int, default=16, help="completions to compare (default 16)")
    options = parser.parse_args(args)
    if options.sequences < 1:
        parser.error(f"--sequences must be at least 1: got {options.sequences}")
    guarded(lambda: _audit(options.run.expanduser().resolve(), options.sequences))


def _audit(run_dir: Path, sequences: int) -> None:
    from gspo_dist.trainer.audit import audit_run

    print(audit_run(run_dir, sequences))
