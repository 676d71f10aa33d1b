"""One W&B page that compares the arms of a study: described as JSON, and saved there where wandb-workspaces is installed.

    python -m gspo_dist.studies.workspace --study qwen3_30b_a3b --to workspace.json
    pip install wandb-workspaces
    python -m gspo_dist.studies.workspace --study qwen3_30b_a3b --entity TEAM --create     (prints the page's address)

Runs of a study share a W&B group and carry the tags [study, arm] (compare/study.py). The page keeps the runs tagged with
the study and groups them by their tags: one line an arm, the mean over its seeds, with the standard error as a band.
By hand, in the project's workspace: filter Tags = STUDY, group by Tags, set the x axis to `step`, and add one line plot
for every `metric` of the JSON, under its section.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gspo_dist.config import WandbConfig
from gspo_dist.metrics.sinks import write_json


@dataclass(frozen=True)
class Panel:
    """One line plot of one metric; log_y: a logarithmic y axis; x: the metric along the x axis."""

    title: str
    metric: str
    log_y: bool = False
    x: str = "step"


@dataclass(frozen=True)
class Section:
    """Panels under one heading, in reading order."""

    name: str
    panels: tuple[Panel, ...]


def sections(mini_batches: int = 4) -> tuple[Section, ...]:
    """The page, from the question (who learns more?) to its reasons; every metric is one that runs log."""
    last = mini_batches - 1
    return (
        Section(
            "Learning",
            (
                Panel("held-out accuracy by step", "eval/heldout/accuracy"),
                Panel(
                    "held-out accuracy by completion tokens",
                    "eval/heldout/accuracy",
                    x="rollout/completion_tokens_total",
                ),
                Panel("training reward", "rollout/reward_mean"),
            ),
        ),
        Section(
            "Clipping",
            (
                Panel("share of tokens clipped", "objective/clip_fraction", log_y=True),
                Panel("clipped, positive advantage", "objective/clip_fraction_positive"),
                Panel("clipped, negative advantage", "objective/clip_fraction_negative"),
                Panel("clipped, first mini-batch", "objective/mini_batch_0/clip_fraction"),
                Panel("clipped, last mini-batch", f"objective/mini_batch_{last}/clip_fraction"),
                Panel("offset of the sequence ratio (clip widths)", "contract/offset_clip_widths"),
            ),
        ),
        Section(
            "Routing and mismatch",
            (
                Panel("experts differ: engine / learner", "routing/engine/flip_fraction"),
                Panel("experts differ: after one update", "routing/update/flip_fraction/mini_batch_0"),
                Panel("experts differ: after the step", "routing/update/flip_fraction"),
                Panel("mismatch engine / learner, k3 (nats a token)", "mismatch/k3_kl", log_y=True),
                Panel("tokens off by a factor of 2 or more", "mismatch/extreme_fraction", log_y=True),
                Panel("effective sample share", "mismatch/ess"),
                Panel("bytes of replayed routes a token", "routing/replay_bytes_per_token"),
            ),
        ),
        Section(
            "Health",
            (
                Panel("entropy (nats a token)", "objective/entropy"),
                Panel("gradient norm", "learner/grad_norm", log_y=True),
                Panel("completion length (tokens)", "rollout/completion_tokens_mean"),
                Panel("truncated completions", "rollout/truncated_fraction"),
                Panel("groups without a signal", "rollout/degenerate_group_fraction"),
            ),
        ),
        Section(
            "Cost",
            (
                Panel("seconds of a step", "time/step_s"),
                *(
                    Panel(f"seconds: {part}", f"time/{part}_s")
                    for part in ("collect", "old_logprobs", "update", "sync")
                ),
                Panel("completion tokens a second", "perf/tokens_per_s"),
            ),
        ),
    )


@dataclass(frozen=True)
class Page:
    """What the page shows: the runs of `project` tagged with `study`, grouped by tags."""

    study: str
    project: str = WandbConfig.project
    entity: str | None = None
    group_by: str = "tags"
    sections: tuple[Section, ...] = field(default_factory=sections)

    @property
    def name(self) -> str:
        return f"{self.study}: arms"

    def description(self) -> dict[str, Any]:
        """The page as plain data."""
        return {"name": self.name, "filter": {"tags": self.study}, **asdict(self)}


def workspace(page: Page) -> Any:
    """The page as a `wandb_workspaces` workspace, not yet saved. Raises ValueError without the package or an entity."""
    if page.entity is None:
        raise ValueError("a saved page belongs to a W&B user or team: name it with --entity")
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(
            "saving a page needs wandb-workspaces, which is not installed: pip install wandb-workspaces, or write the "
            "description with --to and set the page up by hand"
        ) from error
    return ws.Workspace(
        entity=page.entity,
        project=page.project,
        name=page.name,
        sections=[
            ws.Section(
                name=section.name,
                is_open=True,
                panels=[
                    wr.LinePlot(
                        title=panel.title,
                        x=panel.x,
                        y=[panel.metric],
                        log_y=panel.log_y,
                        groupby_aggfunc="mean",
                        groupby_rangefunc="stderr",
                    )
                    for panel in section.panels
                ],
            )
            for section in page.sections
        ],
        runset_settings=ws.RunsetSettings(filters=[ws.Tags().isin([page.study])], groupby=[ws.Tags()]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m gspo_dist.studies.workspace", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--study", required=True, help="its name: the group and a tag of its runs")
    parser.add_argument("--project", default=WandbConfig.project)
    parser.add_argument("--entity", help="W&B user or team")
    parser.add_argument(
        "--mini-batches", type=int, default=4, help="optimiser steps a rollout batch, as the runs had"
    )
    parser.add_argument("--to", type=Path, help="write the description here (JSON)")
    parser.add_argument("--create", action="store_true", help="save the page in W&B and print its address")
    options = parser.parse_args(argv)
    if options.to is None and not options.create:
        parser.error("nothing to do: give --to FILE, --create, or both")
    page = Page(options.study, options.project, options.entity, sections=sections(options.mini_batches))
    if options.to is not None:
        write_json(options.to, page.description())
        print(options.to)
    if options.create:
        try:
            print(workspace(page).save().url)
        except ValueError as error:
            print(f"gspo: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
