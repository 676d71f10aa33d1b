"""Environment processes: who fails costs itself, and an episode can be made again in another process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments import pool as pool_module
from gspo_dist.environments.pool import LocalEnvironmentPool, describe
from gspo_dist.environments.protocol import EnvironmentFailure
from gspo_dist.environments.worker import Call
from gspo_dist.rewards.pool import Worker
from gspo_dist.types import Prompt

pytestmark = pytest.mark.slow  # every test starts processes

SOURCE = '''
import os, time
from gspo_dist.environments.protocol import Observation

class Counter:
    """Says how many turns it has seen, and which process it lives in."""

    def __init__(self, start=0):
        self.count = start

    def reset(self, prompt, seed):
        return f"{prompt.text} {seed}"

    def step(self, turn):
        self.count += 1
        if turn == "hang":
            time.sleep(600)
        if turn == "raise":
            raise KeyError("no such thing")
        if turn == "die":
            os._exit(3)
        if turn == "exit":
            raise SystemExit(4)
        if turn == "nan":
            return Observation("", reward=float("nan"))
        if turn == "text":
            return "no observation"
        if turn == "pid":
            return Observation(str(os.getpid()))
        return Observation(f"{self.count}{turn}", reward=0.5, parts={"seen": 1})

class Closed(Counter):
    def close(self):
        if self.count:
            raise OSError("already closed")

class Saved(Counter):
    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = 100 + state["count"]

class Fickle(Counter):
    def reset(self, prompt, seed):
        return str(os.getpid())

def broken():
    raise OSError("no disk")
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def make(source):
    made = []

    def start(name="Counter", **knobs):
        knobs = {"timeout_s": 60.0, **knobs}
        pool = LocalEnvironmentPool(EnvironmentConfig(factory=f"{source}:{name}", **knobs))
        made.append(pool)
        pool.start()
        return pool

    yield start
    for pool in made:
        pool.close()


def call(group, turn=None, history=(), state=None):
    return Call((group, 0), Prompt(f"p{group}", (1,), f"q{group}"), 7 + group, turn, tuple(history), state)


def replies(pool, count):
    found = {}
    until = time.monotonic() + 100
    while len(found) < count:
        assert time.monotonic() < until
        found |= {reply.key[0]: reply for reply in pool.poll(1.0)}
    return found


OPENED = {group: ("", f"q{group} {7 + group}") for group in range(6)}


def test_every_kind_of_failure_costs_its_own_episode_alone(make) -> None:
    """Law 24: all of them in one process, and the episode beside them goes on where it was."""
    pool = make()
    kinds = {0: "hang", 1: "raise", 2: "die", 3: "exit", 4: "nan", 5: "ok"}
    pool.submit([call(group) for group in kinds])
    opened = replies(pool, 6)
    assert {g: r.observation.text for g, r in opened.items()} == {g: OPENED[g][1] for g in kinds}
    pool.submit([call(5, "a", [OPENED[5]])])
    assert replies(pool, 1)[5].observation.text == "1a"
    pool.submit([call(g, turn, [OPENED[g]]) for g, turn in kinds.items() if turn != "ok"])
    pool.submit([call(5, "b", [OPENED[5], ("a", "1a")])])
    assert [given.call.turn for given in pool.given[0]] == ["hang", "raise", "die", "exit", "nan", "b"]
    pool.workers[0].deadline = time.monotonic()  # the minute is over
    told = replies(pool, 6)
    failed = {0: "timeout", 1: "error", 2: "crash", 3: "error", 4: "error", 5: ""}
    assert {g: r.failed for g, r in told.items()} == failed
    assert "sample 0 of group 1 (prompt p1) raised KeyError" in told[1].why
    assert told[5].observation.text == "2b"
    assert (told[5].observation.reward, dict(told[5].observation.parts)) == (0.5, {"seen": 1.0})
    assert told[5].is_replayed
    deaths = pool.take_events()
    assert [event.kind for event in deaths] == ["environment_death"]
    assert "exit status 3" in deaths[0].what


def test_a_process_that_is_killed_from_outside_costs_nothing(make) -> None:
    pool = make()
    pool.submit([call(0)])
    replies(pool, 1)
    pool.submit([call(0, "pid", [OPENED[0]])])
    pid = int(replies(pool, 1)[0].observation.text)
    os.kill(pid, signal.SIGKILL)
    pool.workers[0].process.wait()
    pool.submit([call(0, "x", [OPENED[0]])])
    told = replies(pool, 1)[0]
    assert (told.failed, told.observation.text) == ("", "1x")


def test_an_episode_goes_on_from_its_state_rather_than_by_its_turns(make) -> None:
    pool = make("Saved")
    pool.submit([call(0)])
    assert replies(pool, 1)[0].state == '{"count": 0}'
    pool.submit([call(0, "a", [OPENED[0]])])
    told = replies(pool, 1)[0]
    assert (told.observation.text, told.state) == ("1a", '{"count": 1}')
    other = make("Saved")
    other.submit([call(0, "b", [OPENED[0], ("a", "1a")], told.state)])
    again = replies(other, 1)[0]
    assert (again.observation.text, again.is_replayed) == ("102b", False)
    third = make("Saved")  # without the state its turns are played again
    third.submit([call(0, "b", [OPENED[0], ("a", "1a")])])
    assert replies(third, 1)[0].observation.text == "2b"


def test_an_episode_that_answers_otherwise_when_it_is_played_again_must_begin_again(make) -> None:
    pool = make("Fickle")
    pool.submit([call(0, "a", [("", "another process")])])
    told = replies(pool, 1)[0]
    assert told.is_diverged
    assert "turn 0 answered" in told.why


def test_what_was_cut_when_it_was_recorded_is_the_same_answer(make) -> None:
    pool = make()
    pool.submit([call(0, "c", [("", "q0"), ("abc", "1ab")])])
    told = replies(pool, 1)[0]
    assert (told.is_diverged, told.observation.text) == (False, "2c")


def test_replies_wait_for_whom_they_are_for(make) -> None:
    pool = make()
    pool.submit([call(0), call(1)])
    until = time.monotonic() + 100
    mine = []
    while not mine and time.monotonic() < until:
        mine = pool.poll(1.0, lambda key: key[0] == 1)
    assert [reply.key for reply in mine] == [(1, 0)]
    assert [reply.key for reply in pool.poll(0.0)] == [(0, 0)]
    start = time.monotonic()
    assert pool.poll(500.0) == []  # nobody owes an answer
    assert time.monotonic() - start < 100.0


def test_episodes_are_spread_and_stay_where_they_are(make) -> None:
    pool = make(workers=2)
    pool.submit([call(group) for group in range(4)])
    replies(pool, 4)
    assert sorted(pool.homes.values()) == [0, 0, 1, 1]
    pool.submit([call(group, "pid", [OPENED[group]]) for group in range(4)])
    first = {g: r.observation.text for g, r in replies(pool, 4).items()}
    assert len(set(first.values())) == 2
    history = [OPENED[0], ("pid", first[0])]
    pool.submit([call(0, "pid", history)])
    told = replies(pool, 1)[0]
    assert (told.observation.text, told.is_replayed) == (first[0], False)
    pool.end([(0, 0)])
    assert (0, 0) not in pool.homes


def test_a_process_goes_on_with_the_next_call_while_nobody_listens(make) -> None:
    """Five calls are sent once; then all five answers are there, though nobody listened in between."""
    pool = make()
    pool.submit([call(group) for group in range(5)])
    connection, until = pool.workers[0].connection, time.monotonic() + 100
    answers = []
    while len(answers) < 5 and time.monotonic() < until:
        if connection.poll(1.0):
            answers.append(connection.recv())
    assert [answer.value.observation.text for answer in answers] == [OPENED[g][1] for g in range(5)]


def test_the_deadline_of_a_call_begins_with_the_answer_before_it(make) -> None:
    pool = make()
    pool.submit([call(0), call(1, "hang", [OPENED[1]])])
    first = pool.workers[0].deadline
    assert list(replies(pool, 1)) == [0]
    assert [given.call.turn for given in pool.given[0]] == ["hang"]
    # It is not here yet, so it may take twice as long: once for its turn so far.
    assert pool.workers[0].deadline > first + 59.0


def test_a_process_has_no_more_at_hand_than_a_pipe_takes(make, monkeypatch) -> None:
    """Else parent and process wait for each other: answers of 300 kB, and a megabyte of calls."""
    pool = make(tokens_per_answer=30_000)
    pool.submit([call(group) for group in range(6)])
    replies(pool, 6)
    assert not pool.given[0]
    said = "x" * 300_000
    pool.submit([call(group, said, [OPENED[group]]) for group in range(4)])
    assert len(pool.given[0]) == 1
    assert len(pool.waiting[0]) == 3
    told = replies(pool, 4)
    assert {reply.observation.text for reply in told.values()} == {f"1{said}"}
    monkeypatch.setattr(pool_module, "AHEAD_BYTES", 0)
    pool.submit([call(4, "y", [OPENED[4]]), call(5, "y", [OPENED[5]])])
    assert len(pool.given[0]) == 1
    assert len(replies(pool, 2)) == 2


def test_an_episode_that_fails_to_close_is_over_and_the_next_answer_is_the_next_calls(make) -> None:
    pool = make("Closed")
    pool.submit([call(0), call(1)])
    replies(pool, 2)
    pool.submit([call(0, "a", [OPENED[0]])])
    replies(pool, 1)
    pool.end([(0, 0)])
    pool.submit([call(1, "a", [OPENED[1]])])
    told = replies(pool, 1)[1]
    assert (told.failed, told.observation.text) == ("", "1a")


@pytest.mark.timeout(120)  # else a parent that waits for a process that hangs would wait for ten minutes
def test_a_process_that_hangs_holds_nobody_however_much_there_is_to_tell_it(make) -> None:
    """300 calls wait behind one that hangs, and the 300 episodes end one by one: about twice what its socket
    takes. Its deadline is kept all the same, and whoever comes after it is answered.
    """
    pool = make()
    pool.submit([call(1000, "hang", [("", "q1000 1007")])])
    for group in range(300):
        pool.submit([call(group)])
    for group in range(300):
        pool.end([(group, 0)])
    pool.submit([call(5)])
    pool.workers[0].deadline = time.monotonic()
    told = replies(pool, 2)
    assert {g: r.failed for g, r in told.items()} == {1000: "timeout", 5: ""}
    assert told[5].observation.text == OPENED[5][1]


def test_no_answer_of_an_episode_that_was_ended_is_taken_for_another(make) -> None:
    """Its call is at work when it ends, and the same name begins again: the answer is that of the new one."""
    pool = make()
    pool.submit([call(0), call(1)])
    replies(pool, 2)
    pool.submit([call(0, "late", [OPENED[0]]), call(1, "a", [OPENED[1]])])
    pool.end([(0, 0)])
    pool.submit([call(0, "new", [OPENED[0]])])
    told, until = [], time.monotonic() + 100
    while len(told) < 2 and time.monotonic() < until:
        told += pool.poll(1.0)
    assert [(r.key[0], r.observation.text, r.is_replayed) for r in told] == [
        (1, "1a", False),
        (0, "1new", True),
    ]


def test_a_process_that_cannot_start_again_is_told(make, monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "DEATHS_IN_A_ROW", 1)
    pool = make()
    monkeypatch.setattr(pool_module.LocalEnvironmentPool, "_worker", dead_worker)
    pool.workers[0].process.kill()
    pool.workers[0].process.wait()
    pool.submit([call(0)])
    with pytest.raises(ValueError, match=r"environment .*mine.py:Counter ended \(signal SIGKILL\) while it"):
        replies(pool, 1)


def dead_worker(self):
    worker = Worker((self.config, self.form), "gspo_dist.environments.worker", self.env)
    worker.process.kill()
    return worker


def test_without_a_stated_reward_a_failure_stops_the_run_with_the_trace(make) -> None:
    pool = make(failure_reward=None)
    pool.submit([call(0, "raise", [OPENED[0]])])
    with pytest.raises(
        EnvironmentFailure, match=r"group 0 \(prompt p0\) raised KeyError.*failure_reward"
    ) as e:
        replies(pool, 1)
    assert "no such thing" in "".join(e.value.__notes__)


def test_too_many_failures_in_a_row_stop_the_run(make, monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "FAILURES_IN_A_ROW", 3)
    pool = make()
    pool.submit([call(0)])
    replies(pool, 1)
    for turn in ("raise", "raise", "ok", "text", "raise"):
        pool.submit([call(0, turn, [OPENED[0]])])
        replies(pool, 1)
    pool.submit([call(0, "raise", [OPENED[0]])])
    with pytest.raises(EnvironmentFailure, match="raised KeyError") as error:
        replies(pool, 1)
    assert "the 3th in a row" in "".join(error.value.__notes__)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("calculator2", "calculator"),
        ("no_such_module:Thing", "cannot import no_such_module"),
        ("{source}:Missing", "has no 'Missing'"),
        ("{source}:broken", "OSError: no disk"),
    ],
)
def test_what_cannot_be_used_is_told_before_the_run(source, factory, words) -> None:
    with pytest.raises(ValueError, match=words):
        describe(EnvironmentConfig(factory=factory.format(source=source)))


def test_options_that_the_factory_does_not_take_are_refused(source) -> None:
    with pytest.raises(ValueError, match=r"environment.options: .* takes \(start=0\): got \['begin'\]"):
        describe(EnvironmentConfig(factory=f"{source}:Counter", options={"begin": 1}))
