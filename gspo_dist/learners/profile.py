"""torch's profiler around what one process computes: a trace for a browser, and where GPU memory went."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

MEMORY_EVENTS = 200_000
"""Allocations and frees that are remembered, the newest ones: a snapshot of some hundred megabytes."""


class Profiler:
    """Records between `start` and `stop`. Anything may go wrong in it, and nothing depends on it."""

    def __init__(self) -> None:
        self._profile: Any = None

    def start(self) -> None:
        """Begins to record this thread's operators and its GPU's kernels and memory.

        A recording that is under way is dropped.
        """
        import torch

        self._drop()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        # Without stacks: they make a trace several times as large, and each operator several times as slow.
        profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        profile.start()
        self._profile = profile

    def stop(self, folder: Path, name: str) -> list[Path]:
        """Ends the recording and writes it to `folder`, made if need be. Returns the files; none if none ran.

        name.trace.json.gz is for chrome://tracing or ui.perfetto.dev. name.memory.pickle, where there is a
        GPU, is for pytorch.org/memory_viz.

        Raises OSError, or what torch raises, when it cannot be written. The recording is over then too.
        """
        import torch

        if self._profile is None:
            return []
        profile, self._profile = self._profile, None
        try:
            profile.stop()
            folder.mkdir(parents=True, exist_ok=True)
            files = [folder / f"{name}.trace.json.gz"]
            with _whole(files[0]) as part:
                profile.export_chrome_trace(str(part))
            if torch.cuda.is_available():
                files.append(folder / f"{name}.memory.pickle")
                with _whole(files[1]) as part:
                    torch.cuda.memory._dump_snapshot(str(part))
            return files
        finally:
            self._forget()

    def _drop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
            self._forget()

    def _forget(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)


@contextlib.contextmanager
def _whole(path: Path) -> Any:
    """A place to write to, which becomes `path` at the end of the block. What fails leaves nothing."""
    part = path.with_name(f"part-{path.name}")  # the ending says how torch writes it
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
