"""Where a run's numbers go: the protocol of a sink, and a run's sinks as one.

metrics.jsonl is the record of a run: resuming, curves and reports read it, so a run that cannot write it
stops (metrics/jsonl.py says why). Everything else only records. It may fail at any time, says so once, and
the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

Row = Mapping[str, float]
"""Key -> number; a number may be nan or infinite."""
SampleRow = Mapping[str, object]
"""One rollout for a reader: texts and numbers, and an answer of whatever type the data has."""


class Sink(Protocol):
    """One place that a run reports to. Every verb may raise anything; `Sinks` decides what that means."""

    def log(self, step: int, row: Row) -> None:
        """Takes the numbers of a step. Called once per step, in order; `step` counts rollout batches."""

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Takes a few rollouts of a step, before its numbers. Called at most once per step."""

    def collecting(self, step: int, row: Row) -> None:
        """Takes how far the collect of a step is, where that takes long."""

    def event(self, step: int, text: str) -> None:
        """Takes one line about a process that died or came back."""

    def image(self, name: str, path: Path) -> None:
        """Takes a picture that lies in the run folder. Called at the end of a run, once per name."""

    def abandon(self) -> None:
        """Ends without last numbers: the run begins again in this process, with sinks of its own."""

    def close(self, summary: Mapping[str, object]) -> None:
        """Takes the run's last numbers and ends. Called once, and nothing is called after it."""


class Sinks:
    """A run's record and whatever else is told about it. Itself a sink."""

    def __init__(self, record: Sink, others: Sequence[Sink] = ()) -> None:
        """`record` must take every step's numbers; `others` may fail without ending the run."""
        self.record = record
        self.others = tuple(others)
        self._said: set[str] = set()

    def log(self, step: int, row: Row) -> None:
        """Raises what the record raises: OSError on a full disk."""
        self.record.log(step, row)
        for sink in self.others:
            with self._going_on(sink, "the step's numbers"):
                sink.log(step, row)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Raises nothing."""
        for sink in (self.record, *self.others):
            with self._going_on(sink, "samples"):
                sink.samples(step, rows)

    def collecting(self, step: int, row: Row) -> None:
        """Raises nothing."""
        for sink in (self.record, *self.others):
            with self._going_on(sink, "progress"):
                sink.collecting(step, row)

    def event(self, step: int, text: str) -> None:
        """Raises nothing."""
        for sink in (self.record, *self.others):
            with self._going_on(sink, "events"):
                sink.event(step, text)

    def image(self, name: str, path: Path) -> None:
        """Raises nothing."""
        for sink in (self.record, *self.others):
            with self._going_on(sink, "pictures"):
                sink.image(name, path)

    def abandon(self) -> None:
        """Raises nothing."""
        for sink in (self.record, *self.others):
            with self._going_on(sink, "an end"):
                sink.abandon()

    def close(self, summary: Mapping[str, object]) -> None:
        """Raises nothing: by then every step is in the record and the last checkpoint is saved."""
        for sink in (self.record, *self.others):
            with self._going_on(sink, "the summary"):
                sink.close(summary)

    def _going_on(self, sink: Sink, what: str) -> AbstractContextManager[None]:
        return going_on_without(f"{what} in {type(sink).__name__}", self._said)


@contextmanager
def going_on_without(what: str, said: set[str] | None = None) -> Iterator[None]:
    """A block that only records: what it raises is said, and the run goes on.

    said: what was said before and is not said again; failures of one kind tend to come with every step.
    """
    try:
        yield
    except Exception as error:
        if said is None or what not in said:
            log.warning("the run goes on without %s: %s: %s", what, type(error).__name__, error)
        if said is not None:
            said.add(what)
