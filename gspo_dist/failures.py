"""Processes that ended or fell silent, as errors and as news. Here, so that no caller has to import ray."""

from __future__ import annotations

from typing import NamedTuple


class ProcessDied(RuntimeError):
    """A process ended. The message names it and shows its last lines."""


class ProcessTimeout(TimeoutError):
    """A process did not answer in time. The message names it and shows its last lines."""


class CollectiveTimeout(ProcessTimeout):
    """A rank waited too long for another one. The message says in which collective."""


class Event(NamedTuple):
    """Something that happened to a process of the run, for whoever keeps the record."""

    kind: str
    """engine_death, engine_return, reward_death, restart."""
    who: str
    """The process, such as engine-1."""
    what: str
    """How it happened, in one line."""


def first_line(error: BaseException) -> str:
    """An error in one line: the first of its message, or its type where it has none (a MemoryError)."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
