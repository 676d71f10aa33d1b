"""One W&B page that compares the arms of a study: described as JSON, and saved in W&B.

Runs of a study share a W&B group and carry the tags [study, arm] (studies/study.py). The page keeps the runs
tagged with the study and groups them by their tags: one line per arm, the mean over its seeds, with the
standard error as a band. Saving it takes the package wandb-workspaces, which is not installed with gspo_dist.
By hand, in the project's workspace: filter Tags = STUDY, group by Tags, set the x axis to `step`, and add one
line plot for every `metric` of the JSON, under its section.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gspo_dist.config import WandbConfig
from gspo_dist.metrics.jsonl import write_json


@dataclass(frozen=True)
class Panel:
    """One line plot of one metric."""

    title: str
    """Over the plot."""
    metric: str
    """Key along the y axis."""
    log_y: bool = False
    """Whether the y axis is logarithmic."""
    x: str = "step"
    """Key along the x axis."""


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    name: str
    """The heading."""
    panels: tuple[Panel, ...]
    """In reading order."""


def sections(mini_batches: int = 4) -> tuple[Section, ...]:
    """The page, from the question (who learns more?) to its reasons. Every metric is one that runs log.

    mini_batches: optimiser steps per rollout batch, as the runs had. The last one has panels of its own.
    """
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
                Panel("offset of the sequence ratio (clip widths)", "guard/offset_clip_widths"),
            ),
        ),
        Section(
            "Routing and mismatch",
            (
                Panel("experts differ: engine / learner", "routing/engine/flip_fraction"),
                Panel("experts differ: after one update", "routing/update/flip_fraction/mini_batch_0"),
                Panel("experts differ: after the step", "routing/update/flip_fraction"),
                Panel("mismatch engine / learner, k3 (nats per token)", "mismatch/k3_kl", log_y=True),
                Panel("tokens off by a factor of 2 or more", "mismatch/extreme_fraction", log_y=True),
                Panel("effective sample share", "mismatch/ess"),
                Panel("bytes of replayed routes per token", "routing/replay_bytes_per_token"),
            ),
        ),
        Section(
            "Health",
            (
                Panel("entropy (nats per token)", "objective/entropy"),
                Panel("gradient norm", "learner/grad_norm", log_y=True),
                Panel("completion length (tokens)", "rollout/completion_tokens_mean"),
                Panel("truncated completions", "rollout/truncated_fraction"),
                Panel("groups without a signal", "rollout/degenerate_group_fraction"),
            ),
        ),
        Section(
            "Cost",
            (
                Panel("seconds per step", "time/step_s"),
                *(
                    Panel(f"seconds: {part}", f"time/{part}_s")
                    for part in ("collect", "old_logprobs", "update", "sync")
                ),
                Panel("completion tokens per second", "perf/tokens_per_s"),
            ),
        ),
    )


@dataclass(frozen=True)
class Page:
    """What the page shows: the runs of `project` tagged with `study`."""

    study: str
    """Its name: the group and a tag of its runs."""
    project: str = WandbConfig.project
    """The W&B project of the runs."""
    entity: str | None = None
    """W&B user or team; needed to save the page."""
    group_by: str = "tags"
    """What makes one line of several runs."""
    sections: tuple[Section, ...] = field(default_factory=sections)
    """From top to bottom."""

    @property
    def name(self) -> str:
        """Heading of the page."""
        return f"{self.study}: arms"

    def description(self) -> dict[str, Any]:
        """The page as plain data."""
        return {"name": self.name, "filter": {"tags": self.study}, **asdict(self)}


def workspace(page: Page) -> Any:
    """The page as a `wandb_workspaces` workspace, not yet saved.

    Raises ValueError without the package or an entity.
    """
    if page.entity is None:
        raise ValueError("a saved page belongs to a W&B user or team: name it with --entity")
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(
            "saving a page needs wandb-workspaces, which is not installed: pip install wandb-workspaces, or "
            "write the description with --to and set the page up by hand"
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


def make_page(page: Page, to: Path | None = None, *, create: bool = False) -> list[str]:
    """Writes the page's description to `to` and saves the page in W&B, whichever is asked for.

    Returns what there is to show: the path, the page's address. Raises ValueError when neither is asked for,
    and for a page that cannot be saved (see `workspace`).
    """
    if to is None and not create:
        raise ValueError(
            "a workspace page goes to a file or to W&B: got neither; give --to FILE, --create, or both"
        )
    shown = []
    if to is not None:
        write_json(to, page.description())
        shown.append(str(to))
    if create:
        shown.append(str(workspace(page).save().url))
    return shown
