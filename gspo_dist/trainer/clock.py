"""The time of a step, split by what it was spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """`with clock("collect"):` adds to time/collect_s. What no block covers is time/other_s."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a step: nothing is spent yet."""
        self.started = time.perf_counter()
        self.spans: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the seconds of the block under `name`, also when it raises. Blocks must not lie
        inside each other.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spans[name] = self.spans.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of each span so far, of the whole step so far, and of the rest."""
        whole = time.perf_counter() - self.started
        out = {f"time/{name}_s": seconds for name, seconds in self.spans.items()}
        out["time/step_s"] = whole
        out["time/other_s"] = max(0.0, whole - sum(self.spans.values()))
        return out
