"""What happens to a run's processes: written by name, counted over interruptions, and shown."""

from __future__ import annotations

import re

import pytest

from gspo_dist.failures import Event
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.sinks import Sinks
from gspo_dist.trainer.health import Health


class Told:
    def __init__(self):
        self.lines = []

    def event(self, step, text):
        self.lines.append((step, text))


DIES = Event("engine_death", "engine-1", "engine-1 died: killed")
RETURNS = Event("engine_return", "engine-1", "after: that")
BEGINS_AGAIN = Event("restart", "run", "x")


def test_events_are_written_by_name_counted_and_shown_over_interruptions(tmp_path):
    sink = Told()
    health = Health(tmp_path, Sinks(sink))
    assert set(health.metrics().values()) == {0.0}
    health.note(3, [DIES])
    health.note(4, [RETURNS, BEGINS_AGAIN])
    rows = read_jsonl(tmp_path / "events.jsonl")
    assert [(row["step"], row["kind"], row["who"], row["what"]) for row in rows] == [
        (3, "engine_death", "engine-1", "engine-1 died: killed"),
        (4, "engine_return", "engine-1", "after: that"),
        (4, "restart", "run", "x"),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["at"]) for row in rows)
    assert sink.lines == [
        (3, "engine death: engine-1: engine-1 died: killed"),
        (4, "engine return: engine-1: after: that"),
        (4, "restart: run: x"),
    ]
    again = Health(tmp_path, Sinks(Told()))
    again.note(9, [Event("engine_death", "engine-0", "hung")])
    assert again.metrics() == {
        "health/engine_deaths": 2.0,
        "health/engine_returns": 1.0,
        "health/reward_deaths": 0.0,
        "health/restarts": 1.0,
    }


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("reward_death", "health/reward_deaths"), ("environment_death", "health/environment_deaths")],
)
def test_every_kind_has_its_metric(tmp_path, kind, metric):
    """A run without environments has none of theirs."""
    health = Health(tmp_path, Sinks(Told()))
    assert health.metrics().get(metric, 0.0) == 0.0
    assert "health/environment_deaths" not in health.metrics()
    health.note(1, [Event(kind, "worker-0", "killed")])
    assert health.metrics()[metric] == 1.0


def test_an_event_that_cannot_be_written_is_counted_and_shown_all_the_same(tmp_path, caplog):
    sink = Told()
    health = Health(tmp_path / "none", Sinks(sink))
    health.note(3, [DIES, RETURNS])
    assert caplog.text.count("the run goes on without events.jsonl") == 2
    assert len(sink.lines) == 2
    assert health.metrics()["health/engine_deaths"] == 1.0
