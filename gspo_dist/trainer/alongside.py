"""Work of the engines in a thread, while the learner works in its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IsOver = Callable[[], bool]
"""Whether the learner is done."""


@contextmanager
def alongside(name: str, work: Callable[[IsOver], None]) -> Iterator[None]:
    """Runs `work(is_over)` in a thread as long as the block lasts, and waits for its end.

    work: ends soon once `is_over()` is true. What it raises is raised after the block, unless the block has
    raised itself. name: the thread's.
    """
    over, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(over.is_set)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]
