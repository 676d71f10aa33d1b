"""Laws of actor processes: who answers, who died, and what the caller gets to read of it."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
import ray

from gspo_dist.actors.process import TAIL_LINES, ActorProcess, Actors, ProcessDied, ProcessTimeout

pytestmark = pytest.mark.slow
# The workers cannot import a test module by its name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Echo(ActorProcess):
    """An actor that does as it is told."""

    def echo(self, value, *, twice=False):
        return (self.name, value, value) if twice else (self.name, value)

    def speak(self, text):
        print(text)
        sys.stdout.flush()
        os.system(f"echo a child says {text}")

    def nap(self, seconds):
        time.sleep(seconds)

    def close(self):
        """Slowly, and leaves a mark."""
        time.sleep(0.5)
        (Path(self.marks) / self.name).touch()

    def mark_in(self, folder):
        self.marks = folder

    def fail(self):
        raise KeyError("gold")

    def die(self):
        print("last words", flush=True)
        os._exit(1)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs") / "below"


@pytest.fixture
def actors(ray_here, logs):
    made = make(("one", "two"), logs)
    made.call_all("echo", 0, timeout=120)  # a process takes seconds to start
    yield made
    made.kill()


def make(names, logs) -> Actors:
    remote = ray.remote(Echo)
    return Actors({name: remote.options(num_cpus=0).remote(name, str(logs)) for name in names}, logs)


def test_answers_come_by_name_in_the_order_of_the_actors(actors):
    answers = actors.call_all("echo", 7, timeout=60, twice=True)
    assert list(answers.items()) == [("one", ("one", 7, 7)), ("two", ("two", 7, 7))]
    slow_first = {"two": actors.handles["two"].nap.remote(0.3), "one": actors.handles["one"].echo.remote(1)}
    assert list(actors.gather(slow_first, 60)) == ["two", "one"]


def test_all_that_a_process_writes_is_in_its_log(actors, logs):
    (logs / "one.log").open("a").write("from an earlier run\n")
    actors.call_all("speak", "hello", timeout=60)
    lines = (logs / "one.log").read_text().splitlines()
    assert {"from an earlier run", "hello", "a child says hello"} <= set(lines)


def test_a_failure_is_raised_at_once_with_its_type_and_the_actors_name(actors, logs):
    began = time.monotonic()
    refs = {"one": actors.handles["one"].nap.remote(60), "two": actors.handles["two"].fail.remote()}
    with pytest.raises(KeyError, match="gold") as caught:
        actors.gather(refs, 120)
    assert time.monotonic() - began < 20
    assert f"raised in two; its log: {logs / 'two.log'}" in caught.value.__notes__[0]


def test_a_death_is_told_at_once_with_the_last_words(actors):
    began = time.monotonic()
    refs = {"one": actors.handles["one"].nap.remote(60), "two": actors.handles["two"].die.remote()}
    with pytest.raises(ProcessDied, match=r"(?s)^two died: .*last words"):
        actors.gather(refs, 120)
    assert time.monotonic() - began < 20


def test_whoever_is_late_is_named(actors):
    refs = {"one": actors.handles["one"].echo.remote(1), "two": actors.handles["two"].nap.remote(60)}
    began = time.monotonic()
    with pytest.raises(ProcessTimeout, match=r"^no answer within 3 s from two\n"):
        actors.gather(refs, 3.0)
    assert 2.9 < time.monotonic() - began < 20


def test_a_killed_actor_answers_no_more(ray_here, logs):
    group = make(("three",), logs)
    assert group.call_all("echo", 1, timeout=60) == {"three": ("three", 1)}
    group.kill()
    group.kill()
    # A long call: Ray kills from beside, and a short one may be answered before the signal comes.
    with pytest.raises(ProcessDied, match=r"^three died: "):
        group.call_all("nap", 60, timeout=90)


def test_whoever_is_asked_to_close_has_closed_or_had_its_time(actors, tmp_path):
    actors.call_all("mark_in", str(tmp_path), timeout=60)
    actors.ask_to_close(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    actors.handles["two"].nap.remote(60)
    began = time.monotonic()
    actors.ask_to_close(2.0)
    assert 1.9 < time.monotonic() - began < 30


def test_a_process_says_where_it_can_be_met_and_what_it_took(actors):
    for address, port in actors.call_all("host", timeout=60).values():
        with socket.socket() as probe:
            probe.bind((address, port))
    peaks = actors.peak_memory()
    assert list(peaks) == ["one", "two"]
    # Bytes: a Python process takes more than 10 MiB, and no host of a test has a TiB.
    assert all(10 << 20 < peak["host"] < 1 << 40 for peak in peaks.values())
    assert all(set(peak) == {"host"} for peak in peaks.values())


def test_the_tail_is_the_end_of_the_log(tmp_path):
    lines = [f"line {i}" for i in range(40)]
    (tmp_path / "one.log").write_text("\n".join(lines) + "\n")
    tail = Actors({}, tmp_path).tail("one").splitlines()
    assert tail == ["  last lines of its log:", *(f"    {line}" for line in lines[-TAIL_LINES:])]
    assert len(tail) == 16


def test_a_log_on_another_host_is_told(tmp_path):
    words = f"no log at {tmp_path / 'one.log'} on this host: it lies on the node of one"
    assert words in Actors({}, tmp_path).tail("one")
