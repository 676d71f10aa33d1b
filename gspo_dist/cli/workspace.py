"""`gspo workspace`: one W&B page that compares the arms of a study (studies/workspace.py)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.exits import guarded
from gspo_dist.config import WandbConfig


def main(args: Sequence[str]) -> None:
    """Writes the page's description, saves the page in W&B, or both, and prints where."""
    parser = argparse.ArgumentParser(
        "gspo workspace",
        description="One W&B page for the arms of a study: as JSON (--to), saved in W&B (--create).",
    )
    parser.add_argument("--study", required=True, help="its name: the group and a tag of its runs")
    parser.add_argument("--project", default=WandbConfig.project, help="W&B project of the runs")
    parser.add_argument("--entity", help="W&B user or team (needed with --create)")
    parser.add_argument("--mini-batches", type=int, default=4, help="optimiser steps per rollout batch")
    parser.add_argument("--to", type=Path, help="write the description here (JSON)")
    parser.add_argument("--create", action="store_true", help="save the page in W&B and print its address")
    options = parser.parse_args(args)
    guarded(lambda: _make(options))


def _make(options: argparse.Namespace) -> None:
    from gspo_dist.studies.workspace import Page, make_page, sections

    page = Page(
        options.study,
        project=options.project,
        entity=options.entity,
        sections=sections(options.mini_batches),
    )
    for shown in make_page(page, options.to, create=options.create):
        print(shown)
