"""What happened to the processes of a run: written down by name, counted, and shown."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.failures import Event
from gspo_dist.metrics.jsonl import append, read_jsonl
from gspo_dist.metrics.sinks import Sinks, going_on_without

EVENTS = "events.jsonl"
KINDS = {
    "engine_death": "health/engine_deaths",
    "engine_return": "health/engine_returns",
    "reward_death": "health/reward_deaths",
    "environment_death": "health/environment_deaths",
    "restart": "health/restarts",
}
"""Kind of an event -> the metric that counts it."""


class Health:
    """The events of a whole run, over its interruptions."""

    def __init__(self, folder: Path, sinks: Sinks) -> None:
        self.path, self.sinks = folder / EVENTS, sinks
        self.counts = Counter(str(row.get("kind")) for row in read_jsonl(self.path))

    def note(self, step: int, events: Sequence[Event]) -> None:
        """Takes events that happened in `step`; what cannot be written is said, and the run goes on."""
        for event in events:
            self.counts[event.kind] += 1
            with going_on_without(EVENTS):
                append(
                    self.path,
                    [{"step": step, "at": time.strftime("%FT%TZ", time.gmtime()), **event._asdict()}],
                )
            self.sinks.event(step, f"{event.kind.replace('_', ' ')}: {event.who}: {event.what}")

    def metrics(self) -> dict[str, float]:
        """health/*: how many of each kind the run has had so far; of environments, where there were any."""
        return {
            name: float(self.counts[kind])
            for kind, name in KINDS.items()
            if kind != "environment_death" or self.counts[kind]
        }
