"""Checkpoints: written beside, renamed whole; a killed run finds either the last one or the one before.

Layout of a run folder: config.json, metrics.jsonl, samples.jsonl, summary.json, curves.png, logs/, and
checkpoints/step-000040/{manifest.json, learner/...}. The manifest carries what the trainer needs beyond the learner's
own files: step, policy version, data cursor, counters, guard state, random states.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

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


def hold(run_dir: Path) -> IO[str]:
    """Makes this process the only one that writes to `run_dir`, until the file that it returns is closed (a killed
    process lets go too). Raises ValueError naming the holder. On a file system without locks it warns and goes on."""
    lock = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the run lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ValueError(
            f"run_dir {run_dir} is in use by {holder}: wait for it, or choose another run_dir"
        ) from None
    except OSError as error:  # NFS without its lock daemon, Lustre mounted without -o flock
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            lock.close()
            raise
        log.warning(
            "run_dir %s lies on a file system without locks: nothing keeps a second run out of it", run_dir
        )
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


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
        for path in [*partial.rglob("*"), partial]:  # what other hosts wrote is theirs to sync
            _sync(path)
        final = self.root / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(self.root)
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


def _sync(path: Path) -> None:
    """To the disk, not only to the page cache: a rename may otherwise outlive the data it promises."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
