"""What an engine's processes share has no name once all of them have it: then no end leaves it behind."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path("/dev/shm")
PREFIXES = ("psm_", "vllm_dist_")
"""vllm 0.30.0: message queues (Python's shared memory), and the collectives of CPU workers."""


def unname() -> list[str]:
    """Removes the names of the shared memory that this process and its descendants have mapped; returns them.

    The memory lives until the last of them has ended, however it ends. vLLM removes the names itself only
    when it is asked to close: a killed engine of two workers left four queues and two collectives behind.
    Call it when every worker is up, because a worker finds a queue by its name. vLLM's own removal then finds
    nothing, which Python notes in the log of an engine that closes.
    """
    mapped: set[str] = set()
    for pid in _family(os.getpid()):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue  # it has ended meanwhile
        mapped.update(Path(line.split(maxsplit=5)[-1]).name for line in lines if f" {FOLDER}/" in line)
    names = sorted(name for name in mapped if name.startswith(PREFIXES))
    for name in names:
        (FOLDER / name).unlink(missing_ok=True)
    return names


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        found += [member for child in children for member in _family(int(child))]
    return found
