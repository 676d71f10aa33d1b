"""`gspo episodes`: a page of a run's episodes, token by token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.exits import guarded


def main(argv: Sequence[str]) -> None:
    """Entry point of `gspo episodes`."""
    parser = argparse.ArgumentParser(
        prog="gspo episodes",
        description="Makes an HTML page of a run's episodes: every token with its mask, log-prob, policy "
        "version and advantage.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run with an environment")
    parser.add_argument("--steps", type=int, default=5, help="newest steps that are shown (5)")
    parser.add_argument("--to", metavar="FILE", help="where the page goes (RUN_DIR/episodes.html)")
    options = parser.parse_args(argv)
    guarded(lambda: _write(Path(options.run_dir), options.steps, options.to))


def _write(run_dir: Path, steps: int, to: str | None) -> None:
    from gspo_dist.checks import at_least
    from gspo_dist.files import write_text
    from gspo_dist.trainer.episode_page import page_of

    at_least("--steps", steps, 1)
    target = Path(to) if to is not None else run_dir / "episodes.html"
    write_text(target, page_of(run_dir, steps))
    print(target)
