"""Checkpoints: written beside, then renamed whole, so that a killed run finds the last one or the one before.

A run folder holds config.json, metrics.jsonl, samples.jsonl, summary.json, curves.png, logs/, and
checkpoints/step-000040/ with manifest.json and learner/. The manifest carries what the trainer needs beside
the learner's own files: step, policy version, data cursor, counters, guard state. It also lists the learner's
files, so that a checkpoint that has lost some is told from a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gspo_dist.files import write_text

log = logging.getLogger(__name__)

FORMAT = 2
"""Counts the manifests that a version cannot read. Fields that are new and may be missing keep the number."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    """`<run_dir>/checkpoints/step-<step>`."""
    step: int
    """Completed steps of the run when it was saved."""
    state: Mapping[str, Any]
    """The manifest: what the trainer gave to `commit`, with `format`, `step` and `files`."""

    @property
    def learner(self) -> Path:
        """The folder with the learner's own files."""
        return self.folder / "learner"


def hold(run_dir: Path) -> IO[str]:
    """Makes this process the only one that writes to `run_dir`, until the file that it returns is closed.

    A killed process lets go too. On a file system without locks it warns and goes on.

    Raises ValueError, naming the holder, when another process (or this one, before) holds it.
    """
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
        """keep: how many checkpoints stay; older ones are removed when a newer one is whole."""
        self.root = run_dir / "checkpoints"
        self.keep = keep

    def begin(self, step: int) -> Path:
        """A folder for a checkpoint in the making, with an empty `learner` for the learner's files.

        What an earlier, unfinished attempt at the same step has left there is removed. Raises OSError on a
        full disk, as `saving` does.
        """
        partial = self.root / f".step-{step:06d}.partial"
        with self.saving(partial):
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "learner").mkdir(parents=True)
        return partial

    def commit(self, partial: Path, step: int, state: Mapping[str, Any]) -> Path:
        """Makes the checkpoint real, once per `begin`: manifest, then to the disk, then the name.

        The oldest beyond `keep` are removed at the very end. Raises OSError on a full disk, as `saving` does.
        """
        with self.saving(partial):
            learner = partial / "learner"
            files = {
                path.relative_to(learner).as_posix(): path.stat().st_size
                for path in sorted(learner.rglob("*"))
                if path.is_file()
            }
            manifest = {"format": FORMAT, "step": step, **state, "files": files}
            write_text(partial / "manifest.json", json.dumps(manifest, indent=2))
            for path in [*partial.rglob("*"), partial]:  # what other hosts wrote is theirs to sync
                _sync(path)
            final = self.root / f"step-{step:06d}"
            # An older one of the same step is put aside: a kill while it is removed would leave a torn one.
            aside = self.root / f".step-{step:06d}.replaced"
            if final.exists():
                os.replace(final, aside)
            os.replace(partial, final)
            _sync(self.root)
        for old in [aside, *self._folders()[: -self.keep]]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    @contextlib.contextmanager
    def saving(self, partial: Path) -> Iterator[None]:
        """Around whatever writes to `partial`: on a full disk, removes it and says what is safe.

        Raises OSError with the errno of the disk, the file where it is known, the newest checkpoint, and the
        way out. Every other error passes.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.rmtree(partial, ignore_errors=True)  # it gives back what room it took
            safe = self._folders()
            raise OSError(
                error.errno,
                f"no room to save a checkpoint below {self.root}: {error.strerror} at "
                f"{error.filename or partial}; {f'{safe[-1]} is safe' if safe else 'none was saved before'}; "
                f"free space or lower checkpoint.keep (now {self.keep}), and start the run again",
            ) from error

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None when there is none at all.

        Raises ValueError when it is torn (it names the newest whole one, and how to go on from there) or of
        another format. Going on from an older one in silence would cut steps that were logged.
        """
        folders = self._folders()
        if not folders:
            return None
        checkpoint = self._read(folders[-1])
        if isinstance(checkpoint, Checkpoint):
            return checkpoint
        raise ValueError(
            f"checkpoint {folders[-1]} must be whole: {checkpoint}; {self.way_around(folders[-1])}"
        )

    def way_around(self, folder: Path) -> str:
        """What to do without the checkpoint in `folder`: it names the newest whole one before it."""
        step = int(folder.name[5:])
        older = [other for other in self._folders() if int(other.name[5:]) < step]
        whole = [other for other in older if isinstance(self._read(other), Checkpoint)]
        return f"remove it to go on from {whole[-1]}" if whole else "start a new run_dir"

    def _read(self, folder: Path) -> Checkpoint | str:
        """The checkpoint in a folder, or what is wrong with it."""
        manifest = folder / "manifest.json"
        try:
            state = json.loads(manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "it has no manifest.json"
        except ValueError:
            return f"manifest.json is torn ({manifest.stat().st_size} bytes that are no JSON)"
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            return "manifest.json names no step"
        if state.get("format") != FORMAT:
            return f"it has format {state.get('format')}, and this version reads {FORMAT}"
        for name, size in state.get("files", {}).items():
            path = folder / "learner" / name
            if not path.is_file():
                return f"learner/{name} is missing"
            # Another host's file may have been seen too small when the manifest was written, never too large.
            if path.stat().st_size < size:
                return f"learner/{name} is torn ({path.stat().st_size} of {size} bytes)"
        return Checkpoint(folder, state["step"], state)

    def _folders(self) -> list[Path]:
        """Every checkpoint, whole or torn, oldest first."""
        found = (path for path in self.root.glob("step-*") if path.name[5:].isdigit())
        return sorted(found, key=lambda path: int(path.name[5:]))  # by number: names have six digits or more


def _sync(path: Path) -> None:
    """To the disk, not only to the page cache: a rename may otherwise outlive the data it promises."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
