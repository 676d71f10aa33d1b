"""Which prompts a step takes, how its rollouts come out of the engines, and what K steps ahead may change."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import chain, count
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.failures import Event
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.names import metric_of
from gspo_dist.rewards.reward import Judged, RewardError
from gspo_dist.rollout.engine import Growth, Progress
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.trainer import checkpointing, pipeline
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.clockwork import SLICE_TICKS, Clockwork
from gspo_dist.trainer.collect import collect
from gspo_dist.trainer.episodes import WAIT_S, Moved
from gspo_dist.trainer.pipeline import Collector, progress_metrics
from gspo_dist.types import Completion, SamplingSpec, Turn
from tests.unit.trainer.small import rollout

SAMPLING = SamplingSpec(n=2, max_tokens=8, seed=7, record_routing=True)


class Pool:
    """Engines that give every completion a token a tick, and do three ticks in a slice by the clock.

    Sample i of group g needs lengths(g, i) tokens.

    It writes down what it was asked.
    """

    runs_beside = False

    def __init__(self, lengths=lambda group, sample: 1) -> None:
        self.lengths, self.events = lengths, []
        self.work, self.version, self.asked, self.submitted = [], 0, [], []

    def submit(self, work):
        assert not self.work, "what is in an engine is never submitted again"
        self.work = list(work)
        self.submitted.append([item.key for item in work])

    def advance(self, ticks, seconds):
        self.asked.append((ticks, seconds))
        count = 3 if ticks is None else ticks if isinstance(ticks, int) else ticks["engine-0"]
        if not self.work:
            count = 0
        told, finished = 0, {}
        for _ in range(count):
            for item in list(self.work):
                told += 1
                length = len(item.so_far) + 1
                whole = length == self.lengths(*item.key)
                more = Completion(
                    np.full(1, length),
                    np.ones(1, bool),
                    np.zeros(1, np.float32),
                    np.full(1, self.version, np.int32),
                    "stop" if whole else "",
                    f"{item.key}" if whole else "",
                )
                self.work[self.work.index(item)] = longer = item.extended(more)
                if whole:
                    self.work.remove(longer)
                    finished[item.key] = longer.so_far
        return {"engine-0": Progress(count, told, finished, Growth.of({}))}

    def withdraw(self):
        left, self.work = self.work, []
        return left


class Adding(Pool):
    """Engines that take more work while they have some."""

    def submit(self, work):
        before, self.work = self.work, []
        super().submit(work)
        self.work = [*before, *self.work]


class Judge:
    """Pays the rollout's id, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def judge(self, items):
        self.asked.append([i for i, _, _ in items])
        return [Judged(float(i), {"part": float(i) / 2}) for i, _, _ in items]


class Cursor:
    """Prompts p0, p1, ... without an end; its place is how many it gave."""

    def __init__(self) -> None:
        self.place = 0

    def next(self, n):
        self.place += n
        return [rollout(i).prompt for i in range(self.place - n, self.place)]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state, *, accept_other_prompts):
        self.place = state["place"]


def collector_of(pool=None, *, steps=99, clockwork=None, tell=lambda step, row: None, **knobs):
    config = RolloutConfig(prompts_per_step=3, group_size=2, **knobs)
    return Collector(
        config,
        steps,
        pool or Pool(),
        Judge(),
        Cursor(),
        lambda step: SAMPLING,
        clockwork or Clockwork(config),
        tell,
    )


def begun_at(collector, step):
    """A collector that goes on with `step`."""
    collector.continue_from(step - 1, {"place": 3 * (step - 1)}, accept_other_prompts=False)
    return collector


def trained(collector, steps, *, learner=lambda step: None):
    """The rollouts of each step, with a publication (a version more) after it."""
    out = []
    for step in steps:
        collector.sample(step)
        out.append(collector.judged(step))
        with collector.beside_learner():
            learner(step)
        collector.pause()
        collector.pool.version += 1
    return out


def clock_of(monkeypatch, step_s):
    """The module's clock stands still, but for a move of `step_s` at every look."""
    looks = count(100.0, step_s)
    clock = SimpleNamespace(monotonic=lambda: next(looks), perf_counter=lambda: next(looks))
    monkeypatch.setattr(pipeline, "time", clock)


def test_ids_count_over_the_run_so_that_a_step_repeats_wherever_it_starts():
    run = SimpleNamespace(collector=begun_at(collector_of(), 5), clock=StepClock())
    rollouts = collect(run, step=5)  # steps 1 to 4 had groups 0 to 11
    assert run.collector.pool.submitted == [[(g, i) for g in (12, 13, 14) for i in range(2)]]
    assert [r.group_id for r in rollouts] == [12, 12, 13, 13, 14, 14]
    assert [r.rollout_id for r in rollouts] == [24, 25, 26, 27, 28, 29]
    assert [r.completion.text for r in rollouts] == [f"({g}, {i})" for g in (12, 13, 14) for i in range(2)]
    assert [r.reward for r in rollouts] == [24.0, 25.0, 26.0, 27.0, 28.0, 29.0]
    assert rollouts[3].reward_parts == {"part": 13.5}
    assert [r.prompt.prompt_id for r in rollouts] == ["p12", "p12", "p13", "p13", "p14", "p14"]
    assert {"time/collect_s", "time/reward_s"} <= set(run.clock.metrics())


def test_a_judge_that_loses_a_verdict_is_not_believed():
    collector = collector_of()
    collector.sample(1)
    collector.rewards = SimpleNamespace(judge=lambda items: [Judged(0.0, {})] * (len(items) - 1))
    with pytest.raises(ValueError, match="shorter"):
        collector.judged(1)


def test_without_steps_ahead_a_step_is_sampled_whole_and_nothing_is_begun_before_its_turn():
    pool = Pool(lambda g, i: 1 + 5 * (g % 3))
    collector = collector_of(pool)
    out = trained(collector, [1, 2, 3])
    assert pool.submitted == [[(g, i) for g in range(s, s + 3) for i in range(2)] for s in (0, 3, 6)]
    assert all(set(r.completion.policy_versions) == {s} for s, step in enumerate(out) for r in step)
    assert collector.rewards.asked == [list(range(6 * s, 6 * s + 6)) for s in range(3)]
    assert collector.buffer.steps == {}
    assert collector.cursor.place == 9


def test_a_checkpoint_goes_on_from_the_prompts_of_the_last_step_that_was_handed_out():
    """The cursor itself is ahead by then: steps 2 and 3 are begun."""
    collector = collector_of(steps_ahead=2)
    assert collector.trained_cursor == {"place": 0}
    trained(collector, [1])
    assert (collector.trained_cursor, collector.cursor.place) == ({"place": 3}, 9)
    # As it is restored, before any step is handed out.
    assert begun_at(collector_of(steps_ahead=2), 5).trained_cursor == {"place": 12}


def lengths_of(group, sample):
    """Between 1 and 30 tokens; group 1 is as long as can be."""
    return 30 if group == 1 else 1 + (7 * group + 11 * sample) % 13


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("ticks", [0, 5, 40])
def test_steps_ahead_change_when_work_is_done_and_nothing_else(ahead, ticks):
    """Every group in order, with its own lengths; no token older than K publications; none thrown away."""
    steps = 7
    pool = Pool(lengths_of)
    collector = collector_of(pool, steps=steps, steps_ahead=ahead, ticks_per_step=ticks)
    ages = []
    out = []
    for step in range(1, steps + 1):
        [rollouts] = trained(collector, [step])
        out += rollouts
        ages += [step - 1 - int(v) for r in rollouts for v in r.completion.policy_versions]
        assert all((np.diff(r.completion.policy_versions) >= 0).all() for r in rollouts)
    assert [r.rollout_id for r in out] == list(range(6 * steps))
    assert [r.prompt.prompt_id for r in out] == [f"p{i // 2}" for i in range(6 * steps)]
    assert [len(r.completion) for r in out] == [lengths_of(i // 2, i % 2) for i in range(6 * steps)]
    assert [r.completion.token_ids[-1] for r in out] == [len(r.completion) for r in out]
    # The bound holds, and fast engines reach it.
    assert max(ages) == ahead
    tokens, seconds = collector.take_speed()
    assert tokens == sum(len(r.completion) for r in out)
    assert seconds > 0
    assert collector.take_speed() == (0, 0.0)
    # Nothing is begun beyond the run's end.
    assert collector.buffer.begun == steps
    assert collector.cursor.place == 3 * steps


def test_the_ticks_beside_the_learner_are_those_that_were_asked_for():
    pool = Pool(lambda g, i: 1000 if g >= 3 else 1)
    collector = collector_of(pool, steps=2, steps_ahead=1, ticks_per_step=21)
    trained(collector, [1])
    assert pool.asked == [(8, None), (8, None), (8, None), (5, None)]
    assert {len(item.so_far) for item in collector.buffer.waiting} == {8 + 21}
    collector.pause()  # as colocated engines, which are emptied before they sleep and at the publication
    assert collector.metrics() == {
        "pipeline/finished_ahead": 0.0,
        "pipeline/unfinished": 6.0,
        "pipeline/carried_tokens": 6 * 29.0,
        "pipeline/ticks": 8.0 + 21.0,
    }
    # The ticks of the next publication are counted anew: 971 tokens are left, in slices of 8.
    trained(collector, [2])
    assert collector.metrics()["pipeline/ticks"] == 976.0


def test_what_waits_already_is_kept_where_the_engines_are_emptied_again():
    """As at the first publication of a resumed run, whose work came from a checkpoint."""
    collector = collector_of(Pool(lambda g, i: 50), steps_ahead=1)
    collector.resume(1)
    collector.pause()
    keys = [item.key for item in collector.buffer.waiting]
    collector.pause()
    assert [item.key for item in collector.buffer.waiting] == keys
    assert len(keys) == 12


def test_finished_rollouts_are_judged_beside_the_learner():
    collector = collector_of(Pool(), steps=2, steps_ahead=1, ticks_per_step=1)
    asked = []
    trained(collector, [1], learner=lambda step: asked.append(list(collector.rewards.asked)))
    assert asked == [[list(range(6)), list(range(6, 12))]]
    trained(collector, [2])
    assert len(collector.rewards.asked) == 2  # and not again


class SlowPool(Pool):
    """As engines in other processes: they work while the caller waits."""

    runs_beside = True

    def advance(self, ticks, seconds):
        time.sleep(0.01)
        return super().advance(1, seconds)


def test_by_the_clock_engines_sample_while_the_learner_works_and_stop_with_it():
    pool = SlowPool(lambda g, i: 100_000 if g >= 3 else 2)
    collector = collector_of(pool, steps=2, steps_ahead=1)
    trained(collector, [1], learner=lambda step: time.sleep(0.3))
    lengths = {len(item.so_far) for item in collector.buffer.waiting}
    assert lengths.pop() > 10
    assert not lengths
    assert pool.work == []
    before = len(pool.asked)
    time.sleep(0.05)
    assert len(pool.asked) == before
    assert {seconds for _, seconds in pool.asked} == {0.25}


class Waiting(Judge):
    """Gives no verdict before the engines have gone on without it."""

    def __init__(self, pool, wanted):
        super().__init__()
        self.pool, self.wanted, self.sampled = pool, wanted, []

    def judge(self, items):
        begun, until = len(self.pool.asked), time.monotonic() + 60
        while len(self.pool.asked) < begun + self.wanted:
            if not self.pool.work:
                break
            assert time.monotonic() < until
            time.sleep(0.001)
        self.sampled.append(len(self.pool.asked) - begun)
        return super().judge(items)


@pytest.mark.parametrize("ahead", [0, 1])
def test_completions_are_judged_while_the_engines_go_on_with_the_others(ahead):
    pool = SlowPool(lambda g, i: 2 if g % 3 == 0 else 40)
    collector = collector_of(pool, steps=2, steps_ahead=ahead)
    collector.rewards = Waiting(pool, wanted=3)
    out = trained(collector, [1, 2], learner=lambda step: time.sleep(0.1))
    assert collector.rewards.asked[0][:2] == [0, 1]
    assert collector.rewards.sampled[0] >= 3  # slices since the first were asked about
    assert sorted(chain(*collector.rewards.asked)) == list(range(12))  # each once
    assert [r.reward for rollouts in out for r in rollouts] == [float(i) for i in range(12)]
    assert collector.judging.under_way is None


def test_a_reward_that_fails_beside_the_engines_stops_the_step():
    class Broken(Judge):
        def judge(self, items):
            raise RewardError(f"rollout {items[0][0]}: the service is down")

    pool = SlowPool(lambda g, i: 2 if g == 0 else 100_000)
    collector = collector_of(pool)
    collector.rewards = Broken()
    with pytest.raises(RewardError, match="rollout 0: the service is down"):
        collector.sample(1)


@pytest.mark.parametrize("beside", [True, False])
def test_the_learner_goes_on_where_all_engines_die_beside_it(beside):
    """New ones come with the publication; what the dead ones had waits for them."""
    pool = SlowPool(lambda g, i: 50 if g >= 3 else 1)
    pool.runs_beside = beside
    collector = collector_of(pool, steps=2, steps_ahead=1, ticks_per_step=None if beside else 5)
    collector.sample(1)
    collector.judged(1)

    def dies(ticks, seconds):
        raise NoEngineLeft("no engine is left (engine-0: killed)")

    pool.advance = dies
    with collector.beside_learner():
        time.sleep(0.05)
    assert [item.key for item in collector.buffer.waiting] == [(g, i) for g in (3, 4, 5) for i in (0, 1)]
    assert {len(item.so_far) for item in collector.buffer.waiting} == {1}


def test_what_is_taken_out_of_the_engines_waits_in_the_order_of_its_keys():
    pool = Pool(lambda g, i: 9)
    withdraw = pool.withdraw
    pool.withdraw = lambda: withdraw()[::-1]
    collector = collector_of(pool, steps_ahead=1)
    collector.resume(1)
    collector.pause()
    assert [item.key for item in collector.buffer.waiting] == [(g, i) for g in range(6) for i in (0, 1)]


def test_beside_the_learner_engines_do_not_wait_for_verdicts_and_the_learner_does():
    """Groups 3 to 5 are of the next step. Who comes after the block finds nothing that is being judged."""
    pool = SlowPool(lambda g, i: {3: 3, 4: 30}.get(g, 1))
    collector = collector_of(pool, steps=2, steps_ahead=1)
    collector.sample(1)
    collector.judged(1)
    collector.rewards = Waiting(pool, wanted=3)
    with collector.beside_learner():
        time.sleep(0.6)
    assert collector.rewards.sampled[0] >= 3
    step = collector.buffer.steps[2]
    assert step.verdicts.keys() == step.finished.keys() == {(g, i) for g in (3, 4, 5) for i in (0, 1)}


def test_the_learner_waits_for_the_verdict_that_is_under_way():
    """An evaluation or a save that comes next may ask the rewards, who judge for one at a time."""
    pool = SlowPool(lambda g, i: 1 if g < 4 else 10_000)
    collector = collector_of(pool, steps=2, steps_ahead=1)
    collector.sample(1)
    collector.judged(1)
    judge, begun = collector.rewards.judge, threading.Event()

    def slowly(items):
        begun.set()
        time.sleep(0.3)
        return judge(items)

    collector.rewards.judge = slowly
    step = collector.buffer.steps[2]
    step.verdicts.clear()
    with collector.beside_learner():
        assert begun.wait(10)
    assert step.verdicts.keys() == step.finished.keys() == {(3, 0), (3, 1)}


def test_completions_of_engines_in_this_process_are_judged_by_whoever_samples():
    collector = collector_of(steps=2, steps_ahead=1, ticks_per_step=4)
    collector.sample(1)
    threads = set()
    judge = collector.rewards.judge

    def noting(items):
        threads.add(threading.current_thread())
        return judge(items)

    collector.rewards.judge = noting
    with collector.beside_learner():
        assert threads == {threading.current_thread()}
        assert len(collector.buffer.steps[2].verdicts) == 6


def test_the_speed_of_engines_is_told_once(monkeypatch):
    """Six completions of 4 tokens take two slices, and a slice two looks at a clock that moves 2 s a look."""
    collector = collector_of(Pool(lambda g, i: 4))
    assert collector.take_speed() == (0, 0.0)
    clock_of(monkeypatch, 2.0)
    collector.sample(1)
    assert collector.take_speed() == (24, 4.0)
    assert collector.take_speed() == (0, 0.0)


def test_what_is_begun_of_later_steps_is_told():
    assert collector_of().metrics() == {}
    collector = collector_of(Pool(lambda g, i: 4), steps_ahead=1)
    none = {"finished_ahead": 0.0, "unfinished": 0.0, "carried_tokens": 0.0, "ticks": 0.0}
    assert collector.metrics() == {f"pipeline/{name}": value for name, value in none.items()}
    collector.pool.lengths = lambda g, i: 1 if g < 3 else 4 + i
    collector.sample(1)
    collector.judged(1)
    collector.pause()
    some = {"finished_ahead": 0.0, "unfinished": 6.0, "carried_tokens": 18.0, "ticks": 3.0}
    assert collector.metrics() == {f"pipeline/{name}": value for name, value in some.items()}


def test_engines_without_work_are_asked_once_beside_the_learner():
    pool = SlowPool()
    collector = collector_of(pool, steps=1, steps_ahead=1)
    trained(collector, [1], learner=lambda step: time.sleep(0.1))
    assert len(pool.asked) == 2


class Tool:
    """An environment of two turns a completion, one token each. It answers when somebody waits for it, and
    groups from the third on only when it is `open`.
    """

    def __init__(self) -> None:
        self.live, self.acting, self.turns, self.open = {}, {}, Counter(), False
        self.waited = []
        self.counts = {"begun_again": 2, "played_again": 3}
        self.pool = SimpleNamespace(take_events=lambda: ["a death"])
        self.bridge = SimpleNamespace(pieces=lambda ids: [f"t{i}" for i in ids])

    def take(self, work):
        self.live |= {item.key: item for item in work}
        return work

    def settle(self):
        return self.poll(1.0)

    def turned(self, finished):
        self.turns.update(finished.keys())
        over = {key: c for key, c in finished.items() if self.turns[key] == 2}
        self.acting |= {key: c for key, c in finished.items() if key not in over}
        return over

    def poll(self, seconds):
        self.waited.append(seconds)
        answered = [key for key in self.acting if seconds and (self.open or key[0] < 3)]
        return Moved([replace(self.live[key], so_far=self.acting.pop(key)) for key in answered])

    def judge(self, items, rewards):
        return rewards.judge(items)


def with_tool(pool, **knobs):
    """A collector whose environment is a `Tool`."""
    tool = Tool()
    pool.lengths = lambda g, i: 1 + tool.turns[g, i]
    collector = collector_of(pool, **knobs)
    collector.episodes = tool
    return collector, tool


def test_environments_are_waited_for_only_where_no_engine_has_work():
    """The slice after the first turn has no work. Slices are short: a turn waits for the end of its slice."""
    collector, tool = with_tool(Pool())
    collector.sample(1)
    assert tool.waited == [0.0, WAIT_S, 0.0]
    assert collector.pool.asked == [(None, 0.05)] * 3
    assert {len(c) for c in collector.buffer.steps[1].finished.values()} == {2}


def test_by_ticks_no_slice_is_spent_on_waiting():
    collector, tool = with_tool(Adding(), steps_ahead=1, ticks_per_step=4)
    collector.sample(1)
    assert tool.waited == [1.0] * 3  # before the first slice too: what resets say is in then
    assert collector.pool.asked == [(SLICE_TICKS, None)] * 2


def test_an_episode_that_its_environment_ends_is_finished():
    collector, tool = with_tool(Pool())
    tool.poll = lambda seconds: Moved([], {key: tool.acting.pop(key) for key in list(tool.acting)})
    collector.sample(1)
    assert {len(c) for c in collector.buffer.steps[1].finished.values()} == {1}


def test_what_environments_did_is_told():
    collector, _ = with_tool(Pool())
    assert collector.metrics() == {"environment/begun_again": 2.0, "environment/played_again": 3.0}
    assert collector.take_events() == ["a death"]
    turns = (Turn(0, 0, 0, "", "go"), Turn(0, 2, 2, "ab"))
    played = rollout(0, tokens=[5, 6])
    played = replace(played, completion=replace(played.completion, turns=turns))
    (row,) = collector.episode_rows([played], [0.5], 3)
    assert (row["tokens"], row["advantages"]) == (["t5", "t6"], [0.5, 0.5])
    plain = collector_of()
    assert (plain.take_events(), plain.episode_rows([played], [0.5], 3)) == ([], [])


def test_engines_that_had_nothing_to_do_go_on_beside_the_learner_once_tools_have_answered():
    """The slice in which the answers come has no token, and still it is not the last one."""
    collector, tool = with_tool(SlowPool(), steps=2, steps_ahead=1)
    collector.sample(1)
    collector.judged(1)
    assert not collector.buffer.steps[2].finished
    with collector.beside_learner():
        time.sleep(0.2)  # no engine has work, and tools have not answered
        tool.open = True
        time.sleep(0.5)
    assert {k: len(c) for k, c in collector.buffer.steps[2].finished.items()} == {
        (g, i): 2 for g in (3, 4, 5) for i in (0, 1)
    }


def test_what_goes_wrong_beside_the_learner_is_raised_after_it():
    pool = SlowPool(lambda g, i: 3 if g >= 3 else 1)
    collector = collector_of(pool, steps=2, steps_ahead=1)
    collector.sample(1)
    collector.judged(1)

    def refuse(items):
        raise ValueError("no such answer")

    collector.rewards = SimpleNamespace(judge=refuse)
    learned = []
    beside = collector.beside_learner()
    beside.__enter__()
    time.sleep(0.1)
    learned.append(True)
    with pytest.raises(ValueError, match="no such answer"):
        beside.__exit__(None, None, None)
    assert learned
    # What the learner raises is not hidden by it.
    with pytest.raises(FloatingPointError), collector.beside_learner():
        raise FloatingPointError


def test_a_record_of_ticks_is_done_again_tick_by_tick(tmp_path):
    """By the clock three ticks fit a slice; the run that repeats it cuts its slices otherwise."""
    config = RolloutConfig(prompts_per_step=3, group_size=2, steps_ahead=2)
    clockwork = Clockwork(config, folder=tmp_path)
    pool = Pool(lengths_of)
    pool.runs_beside = True
    first = trained(
        collector_of(pool, steps=4, steps_ahead=2, clockwork=clockwork),
        range(1, 5),
        learner=lambda step: time.sleep(0.01 * step),
    )
    record = {row["step"]: row["ticks"] for row in read_jsonl(tmp_path / "ticks.jsonl")}
    assert set(record) == {1, 2, 3, 4}
    again = trained(
        collector_of(Pool(lengths_of), steps=4, steps_ahead=2, clockwork=Clockwork(config, record)),
        range(1, 5),
    )
    for one, two in zip(chain(*first), chain(*again), strict=True):
        assert one.completion.policy_versions.tolist() == two.completion.policy_versions.tolist()
    # An engine that died is in the record: ticks alone do not repeat that.
    pool = Pool()
    pool.events = [Event("engine_death", "engine-1", "killed"), Event("engine_return", "engine-2", "up")]
    trained(collector_of(pool, steps_ahead=2, clockwork=Clockwork(config, folder=tmp_path)), [1])
    assert read_jsonl(tmp_path / "ticks.jsonl")[-1] == {
        "step": 1,
        "ticks": {"engine-0": 3},
        "deaths": ["engine-1"],
    }
    short = {step: {"engine-0": 1} for step in record}
    with pytest.raises(ValueError, match=r"step 1 is not sampled after its recorded ticks .*another run"):
        collector_of(Pool(lengths_of), steps_ahead=2, clockwork=Clockwork(config, short)).sample(1)


def test_a_long_collect_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(pipeline, "TELL_EVERY_S", -1.0)
    told = []

    def tell(step, row):
        told.append((step, {name: dict(count) for name, count in row.items()}))

    collector = collector_of(Pool(lambda g, i: 2 + 3 * i), tell=tell)
    collector.sample(1)
    assert told == [
        (1, {"engine-0": {"completions": 3, "tokens": 3 * 2 + 3 * 3}}),
        (1, {"engine-0": {"completions": 6, "tokens": 3 * 2 + 3 * 5}}),
    ]


def test_what_a_long_collect_tells_has_its_entries():
    row = progress_metrics(
        {"engine-0": {"completions": 3, "tokens": 7}, "engine-1": {"completions": 1, "tokens": 2}}
    )
    assert row == {
        "progress/completions": 4.0,
        "progress/tokens": 9.0,
        "progress/engine-0/completions": 3.0,
        "progress/engine-0/tokens": 7.0,
        "progress/engine-1/completions": 1.0,
        "progress/engine-1/tokens": 2.0,
    }
    assert all(metric_of(key) for key in row)


def test_it_says_so_again_after_half_a_minute_and_not_before(monkeypatch):
    """The clock moves 5 s per look, and three looks per slice: after 15 and 30 s it says nothing, after 45 s
    it does.
    """
    clock_of(monkeypatch, 5.0)
    told = []
    collector = collector_of(
        Pool(lambda g, i: 3 * 7), tell=lambda step, row: told.append(row["engine-0"]["tokens"] // 18)
    )
    collector.sample(1)
    assert told == [3, 6]  # slices


def test_a_collect_without_a_token_ends_after_its_deadline(monkeypatch):
    """The clock moves 5 s per look, and three looks per slice."""
    clock_of(monkeypatch, 5.0)
    asked = []
    pool = Pool()

    def advance(ticks, seconds):
        asked.append(ticks)
        return {"engine-0": Progress(1, int(len(asked) < 3), {}, Growth.of({}))}

    pool.advance = advance
    with pytest.raises(TimeoutError, match=r"step 1 got no token within rollout\.timeout_s = 30 s from en"):
        collector_of(pool, timeout_s=30.0).sample(1)
    assert len(asked) == 2 + 3  # after 30 s it is not late yet
    pool = Pool()
    pool.advance = lambda ticks, seconds: {}
    with pytest.raises(TimeoutError, match=r"= 30 s from any engine"):
        collector_of(pool, timeout_s=30.0).sample(1)


def test_a_record_of_engines_that_give_no_token_is_not_waited_for():
    config = RolloutConfig(prompts_per_step=3, group_size=2)
    collector = collector_of(clockwork=Clockwork(config, {1: {"engine-9": 9}}))
    collector.pool.advance = lambda ticks, seconds: {}
    with pytest.raises(ValueError, match=r"step 1 is not sampled after its recorded ticks"):
        collector.sample(1)


@pytest.mark.parametrize("verb", ["submit", "advance"])
def test_when_no_engine_is_left_the_work_is_in_the_buffer(verb):
    pool = Pool(lambda g, i: 50)
    collector = collector_of(pool, steps_ahead=1)
    plain = getattr(pool, verb)

    def dies(*asked):
        plain(*asked)
        raise NoEngineLeft("no engine is left (engine-0: killed)")

    setattr(pool, verb, dies)
    with pytest.raises(NoEngineLeft):
        collector.sample(1)
    assert [item.key for item in collector.buffer.waiting] == [(g, i) for g in range(6) for i in range(2)]
    assert {len(item.so_far) for item in collector.buffer.waiting} == ({3} if verb == "advance" else {0})


@pytest.mark.parametrize(("step", "saved"), [(1, []), (4, [3])])
def test_when_no_engine_is_left_the_state_before_the_step_is_saved(monkeypatch, step, saved):
    """Before the first step there is nothing to save."""
    seen = []
    monkeypatch.setattr(checkpointing, "save", lambda run, at: seen.append(at))
    monkeypatch.setattr(checkpointing, "commit", lambda run: seen.append("committed"))

    def sample(step):
        raise NoEngineLeft

    run = SimpleNamespace(collector=SimpleNamespace(sample=sample), clock=StepClock())
    with pytest.raises(NoEngineLeft):
        collect(run, step)
    assert seen == [*saved, "committed"][: 2 * len(saved)]
