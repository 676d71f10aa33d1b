"""The console: one line per step, and a progress bar on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gspo_dist.metrics.sinks import Row, SampleRow

COLUMNS = (
    ("reward", "rollout/reward_mean", "{:.3f}"),
    ("heldout", "eval/heldout/accuracy", "{:.3f}"),
    ("clip", "objective/clip_fraction", "{:.3f}"),
    ("kl_mismatch", "mismatch/k3_kl", "{:.1e}"),
    ("entropy", "objective/entropy", "{:.3f}"),
    ("grad", "learner/grad_norm", "{:.2f}"),
    ("len", "rollout/completion_tokens_mean", "{:.1f}"),
    ("tok/s", "perf/tokens_per_s", "{:,.0f}"),
    ("step s", "time/step_s", "{:.2f}"),
)
"""(label, key, format), from left to right."""


class ConsoleSink:
    """Progress, reward, clip fraction, tokens per second, time left."""

    def __init__(
        self,
        total_steps: int,
        completed_steps: int = 0,
        console: Console | None = None,
        places: Sequence[str] = (),
    ) -> None:
        """places: lines to begin with, one per process."""
        self.console = console or Console()
        for line in places:
            self.console.print(f"[dim]{escape(line)}[/dim]", highlight=False, soft_wrap=True)
        self.total = total_steps
        self.progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total_steps, completed=completed_steps)

    def log(self, step: int, row: Row) -> None:
        """Prints the columns that the row has a number for."""
        self.progress.start()  # here and not in __init__: before the first step nothing progresses
        text = "  ".join(
            f"{label} {form.format(row[key])}"
            for label, key, form in COLUMNS
            if key in row and not math.isnan(row[key])
        )
        left = row.get("time/left_s")
        # On a terminal the bar shows the time left.
        tail = f"  left {left / 60:.1f} min" if left is not None and not self.console.is_terminal else ""
        line = f"[dim]{step:>5}/{self.total}[/dim]  {text}{tail}"
        self.console.print(line, highlight=False, soft_wrap=True)
        self.progress.update(self.task, completed=step)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """SamplesFile has them."""

    def collecting(self, step: int, row: Row) -> None:
        """Prints completions and tokens of the collect so far."""
        text = "  ".join(f"{key.removeprefix('progress/')} {value:,.0f}" for key, value in row.items())
        self.console.print(
            f"[dim]{step:>5}/{self.total}[/dim]  collecting  {text}", highlight=False, soft_wrap=True
        )

    def event(self, step: int, text: str) -> None:
        """Prints the line."""
        self.console.print(
            f"[dim]{step:>5}/{self.total}[/dim]  {escape(text)}", highlight=False, soft_wrap=True
        )

    def image(self, name: str, path: Path) -> None:
        """A terminal shows no pictures."""

    def abandon(self) -> None:
        """Ends the bar: rich (15.0) shows one at a time."""
        self.progress.stop()

    def close(self, summary: Mapping[str, object]) -> None:
        """Ends the bar; the command prints the summary."""
        self.progress.stop()
