"""Several engines as one: whatever dies, every completion is what a single engine would have sampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.engine import group_work
from gspo_dist.rollout.fleet import Fleet
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.types import Prompt, SamplingSpec, environment_tokens
from tests.unit.rollout.contract import same
from tests.unit.rollout.table_policy import TablePolicy

CONFIG = RolloutConfig(precision="fp32", max_prompt_tokens=16, max_completion_tokens=40)
SPEC = SamplingSpec(n=3, max_tokens=40, seed=5, record_routing=True)
PROMPTS = [Prompt(f"p{i}", tuple(range(1, 3 + i)), "") for i in range(5)]
WORK = group_work(PROMPTS, SPEC, range(5))


def engine(name="engine-0"):
    return ReferenceEngine(CONFIG, TablePolicy(0, vocab_size=40), name=name, record_routing=True)


class Local(Fleet):
    """Engines in this process. `fatal` holds (engine, verb, count): its call of that number finds it dead."""

    def __init__(self, count=3, fatal=(), coming=()):
        super().__init__([f"engine-{i}" for i in range(count)], 1.0)
        self.made = {name: engine(name) for name in self.names}
        self.fatal, self.coming, self.calls, self.waited = set(fatal), list(coming), {}, []

    def each(self, method, arguments, timeout):
        answers, failures = {}, {}
        for name, own in arguments.items():
            self.calls[name, method] = count = self.calls.get((name, method), 0) + 1
            if (name, method, count) in self.fatal:
                self.made[name] = None
            if self.made[name] is None:
                failures[name] = OSError(f"{name} is gone\nits last words")
            else:
                answers[name] = getattr(self.made[name], method)(*own)
        return answers, failures

    def newcomers(self, *, wait):
        self.waited.append(wait)
        came, self.coming = self.coming, []
        self.made |= {name: engine(name) for name in came}
        return came


@pytest.fixture(scope="module")
def whole():
    return sampled(engine())


def sampled(one):
    one.submit(WORK)
    return one.advance().finished


def run_out(fleet, ticks=2):
    """Samples in slices until nothing is left; returns all that finished."""
    found = {}
    while fleet.in_the_making:
        for told in fleet.advance(ticks).values():
            assert not found.keys() & told.finished.keys()
            found |= told.finished
    return found


@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize("verb", ["submit", "advance"])
def test_an_engine_may_die_in_any_slice(whole, verb, at):
    """Laws 10 and 15: nothing is lost or sampled twice, and tokens, log-probs and routes are the same."""
    fleet = Local(fatal=[("engine-1", verb, at)])
    fleet.submit(WORK)
    assert bool(fleet.held["engine-1"]) is ((verb, at) != ("submit", 1))
    same(run_out(fleet), whole)
    assert fleet.in_the_making == 0
    if verb == "advance" or at == 1:
        assert fleet.alive == ["engine-0", "engine-2"]
        [event] = fleet.take_events()
        assert event == ("engine_death", "engine-1", "engine-1 is gone")
        assert fleet.take_events() == []
        assert fleet.held["engine-1"] == {}


def test_the_same_work_again_does_not_begin_with_what_it_had(whole):
    """As a second evaluation in which an engine dies. Nothing is kept of work that is finished."""
    fleet = Local()
    fleet.submit(WORK)
    same(run_out(fleet), whole)
    assert fleet.growth == {name: [] for name in fleet.names}
    fleet.fatal = {("engine-1", "advance", fleet.calls["engine-1", "advance"] + 3)}
    fleet.submit(WORK)
    same(run_out(fleet), whole)
    assert fleet.alive == ["engine-0", "engine-2"]


def test_two_may_die_at_once_and_one_that_got_their_work_after_them(whole):
    fatal = [("engine-0", "advance", 2), ("engine-1", "advance", 2), ("engine-3", "advance", 4)]
    fleet = Local(4, fatal)
    fleet.submit(WORK)
    same(run_out(fleet), whole)
    assert fleet.alive == ["engine-2"]


def test_what_a_dead_engine_had_is_withdrawn_as_it_last_told(whole):
    fleet = Local(2, [("engine-0", "withdraw", 1)])
    fleet.submit(WORK)
    found = {}
    for told in fleet.advance(4).values():
        found |= told.finished
    left = fleet.withdraw()
    assert [item.key for item in left] == sorted({item.key for item in WORK} - found.keys())
    assert {len(item.so_far) for item in left} == {4}
    fleet.submit(left)
    same({**found, **run_out(fleet)}, whole)


@pytest.mark.parametrize("verb", ["submit", "advance"])
def test_without_an_engine_the_work_can_be_withdrawn(whole, verb):
    fleet = Local(2, [("engine-0", verb, 1), ("engine-1", verb, 2 if verb == "advance" else 1)])
    found = {}

    def until_the_end():
        fleet.submit(WORK)
        for _ in range(2):
            for told in fleet.advance(3).values():
                found.update(told.finished)

    with pytest.raises(NoEngineLeft, match=r"no engine is left \(engine-0: engine-0 is gone; engine-1: "):
        until_the_end()
    left = fleet.withdraw()
    assert [item.key for item in left] == [item.key for item in WORK if item.key not in found]
    with pytest.raises(NoEngineLeft):
        fleet.submit(left)
    assert fleet.withdraw() == left
    assert fleet.withdraw() == []


def test_a_successor_samples_nothing_before_its_first_publication(whole):
    """Law 16."""
    fleet = Local(2, [("engine-1", "advance", 2)])
    fleet.submit(WORK)
    found = {}
    for _ in range(3):
        for told in fleet.advance(1).values():
            found |= told.finished
    fleet.coming = ["engine-1"]
    fleet.submit([])
    for told in fleet.advance(1).values():
        found |= told.finished
    left = fleet.withdraw()
    assert fleet.alive == ["engine-0"]
    fleet.start_weight_update(1.0)
    assert fleet.alive == ["engine-0", "engine-1"]
    assert fleet.waited == [False]
    assert [event.kind for event in fleet.take_events()] == ["engine_death", "engine_return"]
    for one in fleet.made.values():
        one.finish_weight_update(0)
    fleet.submit(left)
    assert fleet.held["engine-1"]
    same({**found, **run_out(fleet)}, whole)


def test_a_publication_without_an_engine_waits_for_one():
    fleet = Local(1, [("engine-0", "advance", 1)])
    fleet.submit(WORK)
    with pytest.raises(NoEngineLeft):
        fleet.advance(1)
    with pytest.raises(NoEngineLeft):
        fleet.start_weight_update(1.0)
    fleet.coming = ["engine-0"]
    fleet.start_weight_update(1.0)
    assert fleet.waited == [True, True]
    assert fleet.alive == ["engine-0"]


def test_an_update_is_only_abandoned_because_of_a_death():
    """Those that live give up their half and begin again; one that cannot is replaced like the dead one."""
    fleet = Local(4, [("engine-3", "abandon_weight_update", 1)])
    fleet.start_weight_update(1.0)
    assert not fleet.abandon_update()
    assert fleet.made["engine-0"].arrived is not None  # still open
    assert len(fleet.alive) == 4
    fleet.made["engine-1"] = None
    assert fleet.abandon_update()
    assert fleet.alive == ["engine-0", "engine-2"]
    assert fleet.made["engine-0"].mixed
    assert fleet.deaths == {"engine-1": "engine-1 is gone", "engine-3": "engine-3 is gone"}
    fleet.coming = ["engine-1"]
    fleet.start_weight_update(1.0)
    assert fleet.alive == ["engine-0", "engine-1", "engine-2"]


def test_an_engine_may_break_without_a_word(whole):
    """MemoryError has no message, and its name stands for one."""
    fleet = Local(2)
    fleet.submit(WORK)
    plain = fleet.each

    def breaks(method, arguments, timeout):
        answers, failures = plain(method, arguments, timeout)
        return answers, failures | {"engine-0": MemoryError()} if answers.pop("engine-0", None) else failures

    fleet.each = breaks
    found = {key: c for told in fleet.advance(2).values() for key, c in told.finished.items()}
    assert fleet.deaths == {"engine-0": "MemoryError()"}
    same({**found, **run_out(fleet)}, whole)


def test_a_refusal_is_the_callers_fault_and_kills_nobody():
    fleet = Local(2)
    fleet.submit(WORK[:3])
    with pytest.raises(ValueError, match="got it twice"):
        fleet.made["engine-0"].submit(WORK[:3])
    with pytest.raises(ValueError, match="they have 3 completions; withdraw them"):
        fleet.generate(PROMPTS[:1], SPEC, [7])
    assert len(fleet.alive) == 2


def test_generate_answers_in_the_order_of_the_prompts_whoever_samples(whole):
    fleet = Local(3, [("engine-2", "advance", 1)])
    groups = fleet.generate(PROMPTS, SPEC, range(5))
    same({(g, i): c for g, group in enumerate(groups) for i, c in enumerate(group)}, whole)
    assert np.ptp([len(group) for group in groups]) == 0


def test_ticks_may_be_given_by_engine():
    fleet = Local(2)
    fleet.submit(WORK)
    told = fleet.advance({"engine-0": 3})
    assert [progress.ticks for progress in told.values()] == [3, 0]


def test_what_comes_while_others_run_goes_to_who_has_the_least():
    fleet = Local(2)
    fleet.submit(WORK[:9])  # two groups and one
    busiest, other = sorted(fleet.names, key=lambda name: -len(fleet.held[name]))
    fleet.submit(WORK[9:12])
    assert {item.group_id for item in fleet.held[other].values()} >= {3}
    assert len(fleet.held[busiest]) == len(fleet.held[other]) == 6


@pytest.mark.parametrize("at", [6, 8, 12])
def test_an_engine_may_die_in_the_second_turn_of_an_episode(at):
    """What it told of the first turn is in the work that came back, and is not told twice."""

    def turns(fleet):
        fleet.submit([replace(item, until=9) for item in WORK])
        found = run_out(fleet)
        second = []
        for item in WORK:
            so_far = replace(found[item.key], finish_reason="", text="").extend(environment_tokens([7, 8]))
            second.append(replace(item, so_far=so_far))
        fleet.submit(second)
        return found, run_out(fleet)

    first, second = turns(Local(2))
    assert sum(len(c) == 9 for c in first.values()) > 3
    dying = Local(2, {("engine-0", "advance", at)})
    again, gone_on = turns(dying)
    assert dying.deaths
    same(again, first)
    same(gone_on, second)
