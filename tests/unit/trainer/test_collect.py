"""Collecting a step: sampled, judged, asked for again; and what is asked of the engines."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.trainer import collect as collect_module
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.collect import collect, sampling_of
from gspo_dist.types import SamplingSpec

SAMPLING = SamplingSpec(n=2, max_tokens=16, seed=7, record_routing=True)


class Collector:
    """Gives its answers to `judged` in order, and notes what it was asked."""

    def __init__(self, *answers, dies_in=""):
        self.answers, self.dies_in, self.calls = list(answers), dies_in, []

    def _sampled(self, verb, step):
        self.calls.append((verb, step))
        if verb == self.dies_in:
            raise NoEngineLeft("no engine is left")

    def sample(self, step):
        self._sampled("sample", step)

    def try_again(self, step):
        self._sampled("try_again", step)

    def judged(self, step):
        self.calls.append(("judged", step))
        return self.answers.pop(0)


class Clock:
    """Notes what is timed around which call."""

    def __init__(self, collector):
        self.collector, self.timed = collector, []

    def __call__(self, name):
        before = len(self.collector.calls)
        self.timed.append((name, before))
        return StepClock()(name)


def run_of(collector):
    return SimpleNamespace(collector=collector, clock=Clock(collector))


def test_a_step_is_sampled_judged_and_handed_out():
    collector = Collector(["rollouts"])
    run = run_of(collector)
    assert collect(run, 4) == ["rollouts"]
    assert collector.calls == [("sample", 4), ("judged", 4)]
    assert run.clock.timed == [("collect", 0), ("reward", 1)]


def test_it_asks_again_until_it_has_its_groups():
    collector = Collector(None, None, ["rollouts"])
    run = run_of(collector)
    assert collect(run, 4) == ["rollouts"]
    verbs = ["sample", "judged", "try_again", "judged", "try_again", "judged"]
    assert collector.calls == [(verb, 4) for verb in verbs]
    assert [name for name, _ in run.clock.timed] == ["collect", "reward"] * 3


def test_a_batch_without_rollouts_is_no_reason_to_ask_again():
    assert collect(run_of(Collector([])), 1) == []


@pytest.mark.parametrize("verb", ["sample", "try_again"])
def test_where_no_engine_is_left_what_they_had_is_saved_before_it_is_raised(monkeypatch, verb):
    saved = []
    monkeypatch.setattr(collect_module, "save_again", lambda run, step: saved.append((run, step)))
    run = run_of(Collector(None, dies_in=verb))
    with pytest.raises(NoEngineLeft):
        collect(run, 4)
    assert saved == [(run, 3)]  # the newest step that is trained


@pytest.mark.parametrize(
    ("replay", "measured", "records"),
    [("none", False, False), ("none", True, True), ("r2", False, False), ("r3", False, True)],
)
def test_routes_travel_where_they_are_replayed_or_measured(replay, measured, records):
    objective = SimpleNamespace(routing_replay=replay)
    asked = []
    flips = SimpleNamespace(due=lambda step: asked.append(step) or measured)
    assert sampling_of(SAMPLING, objective, flips, 5) == replace(SAMPLING, record_routing=records)
    assert set(asked) <= {5}
    # An engine that records nothing is not asked to.
    assert not sampling_of(replace(SAMPLING, record_routing=False), objective, flips, 5).record_routing


def test_completions_are_as_long_as_the_schedule_says():
    rollout = RolloutConfig(max_completion_tokens=16, length_schedule=[[1, 4], [3, 9], [5, 16]])
    assert [rollout.completion_tokens(step) for step in range(1, 7)] == [4, 4, 9, 9, 16, 16]
    assert RolloutConfig(max_completion_tokens=16).completion_tokens(3) == 16
    objective, flips = SimpleNamespace(routing_replay="none"), SimpleNamespace(due=lambda step: False)
    lengths = [
        sampling_of(SAMPLING, objective, flips, step, rollout).max_tokens for step in (1, 2, 3, 4, 5, 9)
    ]
    assert lengths == [4, 4, 9, 9, 16, 16]
    assert sampling_of(SAMPLING, objective, flips, 2).max_tokens == 16
