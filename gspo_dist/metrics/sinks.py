"""Sinks: a live console, metrics.jsonl, samples.jsonl, and Weights & Biases. The only home of wandb."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gspo_dist.config import WandbConfig

Row = Mapping[str, float]


class Sink(Protocol):
    """Receives one row a step; `step` counts completed rollout batches."""

    def log(self, step: int, row: Row) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def image(self, name: str, path: Path) -> None: ...

    def close(self, summary: Mapping[str, Any]) -> None: ...


class JsonlSink:
    """metrics.jsonl, one object a step, and samples.jsonl; both are cut back to `start_step` when a run resumes."""

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        self.folder = folder
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_rows_before(folder / name, start_step)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
            f.flush()
            os.fsync(f.fileno())

    def log(self, step: int, row: Row) -> None:
        clean = {k: (v if math.isfinite(v) else None) for k, v in sorted(row.items())}
        self._append("metrics.jsonl", [{"step": step, **clean}])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def image(self, name: str, path: Path) -> None:
        """Images already lie in the run folder."""

    def close(self, summary: Mapping[str, Any]) -> None:
        write_json(self.folder / "summary.json", summary)


class ConsoleSink:
    """One line a step: progress, reward, clip fraction, tokens/s, time left."""

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

    def __init__(self, total_steps: int, start_step: int = 0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console()
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
        self.task = self.progress.add_task("", total=total_steps, completed=start_step)
        self.progress.start()

    def log(self, step: int, row: Row) -> None:
        text = "  ".join(
            f"{label} {form.format(row[key])}"
            for label, key, form in self.COLUMNS
            if key in row and row[key] == row[key]
        )
        left = row.get("time/left_s")
        tail = f"  left {left / 60:.1f} min" if left is not None and not self.console.is_terminal else ""
        self.console.print(
            f"[dim]{step:>5}/{self.total}[/dim]  {text}{tail}", highlight=False, soft_wrap=True
        )
        self.progress.update(self.task, completed=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples are in samples.jsonl."""

    def image(self, name: str, path: Path) -> None:
        """No pictures in a terminal."""

    def close(self, summary: Mapping[str, Any]) -> None:
        self.progress.stop()


class WandbSink:
    """Weights & Biases: online with a key, offline without, or as asked for."""

    def __init__(
        self, config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any], resume_id: str
    ) -> None:
        import wandb

        mode = config.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_wandb() else "offline"
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=config.name,
            tags=config.tags,
            config=dict(run_config),
            dir=str(run_dir),
            mode=mode,
            id=resume_id,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("*", step_metric="step")
        # A resumed run repeats the steps since its checkpoint; W&B never forgets a row, so it gets each step once.
        self.repeated = int(self.run.summary.get("step", -1))

    def log(self, step: int, row: Row) -> None:
        if step > self.repeated:
            self.run.log({"step": step, **{k: v for k, v in row.items() if math.isfinite(v)}})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        if rows and step > self.repeated:
            columns = ["step", *rows[0]]
            data = [
                [step, *(str(v) if isinstance(v, (dict, list)) else v for v in row.values())] for row in rows
            ]
            self.run.log({"step": step, "samples": wandb.Table(columns=columns, data=data)})

    def image(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def close(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float, str))})
        self.run.finish()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def log(self, step: int, row: Row) -> None:
        for sink in self.sinks:
            sink.log(step, row)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for sink in self.sinks:
            sink.samples(step, rows)

    def image(self, name: str, path: Path) -> None:
        for sink in self.sinks:
            sink.image(name, path)

    def close(self, summary: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.close(summary)


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics or samples file; a torn last line (a killed run) is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _keep_rows_before(path: Path, start_step: int) -> None:
    """Steps after the checkpoint that a resumed run starts from will be logged again."""
    if not path.is_file():
        return
    rows = [row for row in read_jsonl(path) if row["step"] <= start_step and start_step > 0]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def _netrc_has_wandb() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
