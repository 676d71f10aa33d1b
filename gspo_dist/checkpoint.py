"""Checkpoints: written beside, renamed whole; a killed run finds either the last one or the one before.

Layout of a run folder: config.json, metrics.jsonl, samples.jsonl, summary.json, curves.png, logs/, and
checkpoints/step-000040/{manifest.json, learner/...}. The manifest carries what the trainer needs beyond the learner's
own files: step, policy version, data cursor, counters, guard state, random states.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    @property
    def learner(self) -> Path:
        return self.folder / "learner"


class CheckpointStore:
    """Saves to and finds in `<run_dir>/checkpoints`."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.root = run_dir / "checkpoints"
        self.keep = keep

    def begin(self, step: int) -> Path:
        """An empty folder for the learner's files of a checkpoint in the making."""
        partial = self.root / f".step-{step:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "learner").mkdir(parents=True)
        return partial

    def commit(self, partial: Path, step: int, state: Mapping[str, Any]) -> Path:
        """Makes the checkpoint real (manifest, sync to disk, rename) and drops the oldest beyond `keep`."""
        manifest = partial / "manifest.json"
        with open(manifest, "w", encoding="utf-8") as f:
            json.dump({"format": FORMAT, "step": step, **state}, f, indent=2)
            f.flush()
            os.fsync(f.fileno())
        final = self.root / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. Raises ValueError on one of another format."""
        for folder in reversed(self._folders()):
            manifest = folder / "manifest.json"
            if not manifest.is_file():
                continue
            state = json.loads(manifest.read_text(encoding="utf-8"))
            if state.get("format") != FORMAT:
                raise ValueError(
                    f"checkpoint {folder} has format {state.get('format')}, this version reads {FORMAT}; start a new run_dir"
                )
            return Checkpoint(folder, state["step"], state)
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.root.glob("step-*")) if self.root.is_dir() else []
