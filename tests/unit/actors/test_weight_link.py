"""Learner and engines meet, and who fails is named: whoever cannot come is heard at once, and of several
failures the one that explains the others is raised."""

from __future__ import annotations

import io
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from gspo_dist.actors import learner_group, weight_link
from gspo_dist.actors.learner_group import LearnerRank
from gspo_dist.actors.process import Actors, ProcessDied, ProcessTimeout
from gspo_dist.actors.weight_link import WeightLink, hear_all
from gspo_dist.config import WeightSyncConfig
from gspo_dist.learners.collectives import Watch
from gspo_dist.weights.collective import CollectiveTransport
from gspo_dist.weights.group import TransferFailed
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.actors.virtual_ray import NEVER, Handle, died, due, raised

SYNC = WeightSyncConfig(transport="gloo", timeout_s=60.0)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def handle(told: list | None = None, sees: bool = True):
    """Stands for an engine's actor; `gather` answers with what its calls return."""
    notes = [] if told is None else told
    return SimpleNamespace(
        init_weight_sync=SimpleNamespace(remote=notes.append),
        info=SimpleNamespace(remote=lambda: SimpleNamespace(workers=2)),
        sees=SimpleNamespace(remote=lambda path, token: sees and Path(path).read_text() == token),
    )


class Engines(Actors):
    """The engines' side: `failure` is what their meeting raises, `after` seconds."""

    def __init__(self, handles, failure: Exception | None = None, after: float = 0.05) -> None:
        super().__init__(handles, Path("no-such-folder"))
        self.failure, self.after, self.over, self.asked = failure, after, threading.Event(), []

    def gather(self, refs, timeout):
        self.asked.append(list(refs))
        if self.failure is not None and None in refs.values():  # what `list.append` answered to the meeting
            self.over.wait(self.after)
            raise self.failure
        return refs


def connect(monkeypatch, engines: Engines, meet) -> list[int]:
    """A link whose transport meets by `meet`; returns the numbers of its transport's closings."""
    closed: list[int] = []
    transport = SimpleNamespace(
        name="gloo", init_info=lambda i: i, connect=meet, close=lambda: closed.append(1)
    )
    monkeypatch.setattr(weight_link, "make_transport", lambda *a, **k: transport)
    try:
        WeightLink(SYNC, engines, "10.0.0.1", soon())
    except BaseException:
        assert closed == [1]
        raise
    return closed


def test_an_engine_that_fails_is_heard_while_the_rendezvous_waits(monkeypatch) -> None:
    over = threading.Event()
    engines = Engines({"engine-0": handle()}, RuntimeError("the engine's own words"))
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="the engine's own words"):
        connect(monkeypatch, engines, lambda: over.wait(30))
    assert time.perf_counter() - start < 10
    over.set()


def test_where_this_side_failed_first_its_error_is_the_one_raised(monkeypatch) -> None:
    def broken() -> None:
        raise ValueError("no route to the engines")

    for failure, after in ((TimeoutError("no answer"), 0.05), (None, 0), (TimeoutError("no answer"), 30)):
        engines = Engines({"engine-0": handle()}, failure, after)
        start = time.perf_counter()
        with pytest.raises(ValueError, match="no route to the engines"):
            connect(monkeypatch, engines, broken)
        assert time.perf_counter() - start < 10  # the engines of the last case still wait for this side
        engines.over.set()


def test_both_met_and_a_dump_of_the_threads_would_have_said_who_meets(monkeypatch) -> None:
    met: list[str] = []
    meet = lambda: met.append(threading.current_thread().name)  # noqa: E731
    assert connect(monkeypatch, Engines({"engine-0": handle()}), meet) == []
    assert [name.split("_")[0] for name in met] == ["weight-rendezvous"]


def test_the_log_says_at_once_how_weights_travel_and_to_whom(monkeypatch) -> None:
    """Whoever reads a rank's log while it hangs must find it there: the file is a buffered one."""
    log = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(log)):
        connect(monkeypatch, Engines({"engine-0": handle(), "engine-2": handle()}), lambda: None)
        assert log.getvalue() == b"weight sync: gloo to engine-0, engine-2\n"


def test_every_worker_of_every_engine_gets_a_rank_of_its_own(monkeypatch) -> None:
    """Three engines of two workers each, as the first of them says."""
    told: list = []
    engines = Engines({f"engine-{i}": handle(told) for i in range(3)})
    monkeypatch.setattr(CollectiveTransport, "connect", lambda self: None)
    link = WeightLink(SYNC, engines, "127.0.0.1", soon())
    assert [info["first_rank"] for info in told] == [1, 3, 5]
    assert {info["meeting"]["world_size"] for info in told} == {7}
    assert {info["meeting"]["address"] for info in told} == {"127.0.0.1"}
    # An engine gives a meeting up before this side gives up on it.
    assert [info["meeting"]["timeout_s"] for info in told] == [pytest.approx(0.9 * 60, abs=1)] * 3
    assert engines.asked == [["engine-0"], ["engine-0", "engine-1", "engine-2"]]
    link.close()
    link.close()


@pytest.mark.parametrize(("sees", "name"), [((True, True), "shm"), ((True, False), "gloo")])
def test_auto_is_shared_memory_where_every_engine_sees_it(monkeypatch, sees, name) -> None:
    monkeypatch.setattr(CollectiveTransport, "connect", lambda self: None)
    engines = Engines({f"engine-{i}": handle(sees=s) for i, s in enumerate(sees)})
    link = WeightLink(WeightSyncConfig(transport="auto"), engines, "127.0.0.1", soon())
    assert link.transport.name == name
    link.close()
    if name == "gloo":
        with pytest.raises(ValueError, match="engine-1 cannot see its /dev/shm; use auto or gloo"):
            WeightLink(WeightSyncConfig(transport="shm"), engines, "127.0.0.1", soon())


def test_nothing_of_the_question_about_memory_stays_there(monkeypatch, tmp_path) -> None:
    """/dev/shm is memory: a file per publication would fill it."""
    monkeypatch.setattr(weight_link, "FOLDER", tmp_path)
    asked: list[list[str]] = []

    def sees(path, token):
        asked.append([file.name for file in tmp_path.iterdir()])
        if len(asked) > 1:
            raise ProcessDied("engine-0 died")
        return Path(path).read_text() == token

    engine = handle()
    engine.sees.remote = sees
    auto = WeightSyncConfig(transport="auto")
    assert WeightLink(auto, Engines({"engine-0": engine}), "10.0.0.1", soon()).transport.name == "shm"
    with pytest.raises(ProcessDied):
        WeightLink(auto, Engines({"engine-0": engine}), "10.0.0.1", soon())
    assert [len(names) for names in asked] == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_a_link_reaches_the_very_processes_it_was_made_for(monkeypatch) -> None:
    """An engine that was started anew bears the old one's name."""
    first, second = handle(), handle()
    monkeypatch.setattr(CollectiveTransport, "connect", lambda self: None)
    link = WeightLink(SYNC, Engines({"engine-0": first, "engine-1": second}), "127.0.0.1", soon())
    assert link.reaches({"engine-0": first, "engine-1": second})
    assert not link.reaches({"engine-0": first, "engine-1": handle()})
    assert not link.reaches({"engine-0": first})
    link.close()


def test_nccl_is_not_asked_about_memory(monkeypatch) -> None:
    made: list = []
    nccl = SimpleNamespace(name="nccl", init_info=lambda i: None, connect=lambda: None)
    monkeypatch.setattr(weight_link, "make_transport", lambda name, **told: made.append((name, told)) or nccl)
    sync = WeightSyncConfig(transport="nccl", check=False)
    WeightLink(sync, Engines({"e": handle(sees=False)}), "10.0.0.1", soon(10))
    ((name, told),) = made
    assert (name, told.pop("timeout_s")) == ("nccl", pytest.approx(9, abs=0.5))
    assert told == {"check": False, "address": "10.0.0.1", "engines": ["e"], "engine_workers": 2}


# --- one bucket's answers ---------------------------------------------------------------------------------


class Answers(Actors):
    """Engines whose answers come in the order of `script`: name -> None (taken), an error, or "never"."""

    def __init__(self, monkeypatch, script: dict) -> None:
        super().__init__(dict.fromkeys(script), Path("no-such-folder"))
        self.script, self.waits = script, []

        def wait(refs, timeout):
            self.waits.append(timeout)
            ready = [ref for ref in refs if script[ref] != "never"]
            return ready[:1], refs

        monkeypatch.setattr(weight_link.ray, "wait", wait)

    def gather(self, refs, timeout):
        (name,) = refs
        if self.script[name] is not None:
            raise self.script[name]
        return {name: None}

    def hear(self, seconds: float = 100.0) -> None:
        hear_all(self, {name: name for name in self.script}, soon(seconds))


MISSED, OTHER = TransferFailed("a bucket was lost"), WeightSyncError("norm arrived twice")


def test_all_taken(monkeypatch) -> None:
    Answers(monkeypatch, {"a": None, "b": None}).hear()


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ({"a": TransferFailed("lost"), "b": ProcessDied("b died: killed")}, ProcessDied, "b died: killed"),
        ({"a": WeightSyncError("own"), "b": ProcessDied("b died: killed")}, ProcessDied, "b died: killed"),
        ({"a": TransferFailed("lost"), "b": "never"}, ProcessTimeout, "b did not answer to a bucket"),
        ({"a": TransferFailed("lost"), "b": WeightSyncError("own")}, WeightSyncError, "own"),
        ({"a": WeightSyncError("own"), "b": "never"}, WeightSyncError, "own"),
        ({"a": None, "b": TransferFailed("lost")}, TransferFailed, "lost"),
        ({"a": "never", "b": "never"}, ProcessTimeout, "a, b did not answer to a bucket"),
    ],
)
def test_the_failure_that_explains_the_others_is_raised(monkeypatch, script, kind, message) -> None:
    with pytest.raises(kind, match=f"^{message}") as raised:
        Answers(monkeypatch, script).hear()
    others = [n for n, e in script.items() if isinstance(e, Exception) and e is not raised.value]
    assert [note.split(" then said: ")[0] for note in getattr(raised.value, "__notes__", [])] == others


def test_what_was_missed_waits_for_the_others_and_an_engines_own_fault_only_for_a_death(monkeypatch) -> None:
    answers = Answers(monkeypatch, {"a": TransferFailed("lost"), "b": "never"})
    with pytest.raises(ProcessTimeout):
        answers.hear()
    assert answers.waits == [pytest.approx(100, abs=2)] * 2
    answers = Answers(monkeypatch, {"a": WeightSyncError("own"), "b": "never"})
    with pytest.raises(WeightSyncError):
        answers.hear()
    assert answers.waits == [pytest.approx(100, abs=2), pytest.approx(weight_link.GRACE_S, abs=2)]


def hear(world, folder: Path, deadline: float, **answers) -> None:
    """Hears engines on a virtual clock. Each answer: when it comes, or (when, an error)."""
    hear_all(Actors(dict.fromkeys(answers), folder), due(**answers), deadline)


def test_a_death_is_told_at_once_and_without_one_all_are_heard(world, tmp_path) -> None:
    hear(world, tmp_path, 10.0, a=1.0, b=3.0)
    assert world.now == 3.0
    with pytest.raises(ProcessDied, match="b died"):
        hear(world, tmp_path, 20.0, a=NEVER, b=(5.0, died()), c=6.0)
    assert world.now == 5.0


def test_an_answer_counts_until_the_deadline_and_no_longer(world, tmp_path) -> None:
    hear(world, tmp_path, 10.0, a=9.0, b=10.0)
    with pytest.raises(ProcessTimeout, match=r"^b did not answer"):
        hear(world, tmp_path, 20.0, a=20.0, b=20.5)
    assert world.now == 20.0


@pytest.mark.parametrize(("seconds", "heard"), [(4.5, "b died"), (5.5, "own")])
def test_an_engines_own_fault_waits_five_seconds_for_the_death_behind_it(
    world, tmp_path, seconds, heard
) -> None:
    with pytest.raises(Exception, match=heard):
        hear(
            world, tmp_path, 60.0, a=(7.0, raised(WeightSyncError("own"))), b=(7.0 + seconds, died()), c=NEVER
        )
    assert world.now == 7.0 + min(seconds, 5.0)


def test_an_engine_that_is_told_of_a_bucket_when_time_is_up_has_a_moment_for_it(
    world, tmp_path, monkeypatch
) -> None:
    """Not a negative time, which a wait would refuse in words of its own, and not a second more."""
    link = object.__new__(WeightLink)
    link.engines = Actors({"a": Handle(world, "a")}, tmp_path)
    link.transport = None
    monkeypatch.setattr(weight_link, "send_weights", lambda stream, transport, deliver: deliver({"part": 1}))
    world.now = 100.0
    for deadline in (130.0, 99.0):
        link.send(iter(()), deadline)
    assert [(call[:2], call[2]["part"]) for call in world.calls] == [(("a", "update_weights"), 1)] * 2
    assert [call[2]["seconds"] for call in world.calls] == pytest.approx([27.0, 0.009])


# --- the rank that holds the link -------------------------------------------------------------------------


class Link:
    """Stands for `WeightLink`."""

    made: list[Link]

    def __init__(self, sync, engines, address, deadline) -> None:
        self.names, self.closed, self.handles = list(engines.handles), 0, engines.handles
        Link.made.append(self)

    def reaches(self, engines) -> bool:
        return self.handles == engines

    def send(self, stream, deadline):
        first = next(stream)
        if first == "bad":
            raise TransferFailed("lost")
        return first

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def rank(monkeypatch):
    Link.made = []
    monkeypatch.setattr(learner_group, "WeightLink", Link)
    rank = object.__new__(LearnerRank)
    rank.name, rank._link, rank.host = "learner-0", None, lambda: ("10.0.0.1", 1)
    rank._watch = Watch("learner-0", Path("logs"), 60.0, 60.0)
    rank.drawn = []

    def weights(bucket_bytes, stacked, exporters=None):
        assert stacked
        rank.told = exporters
        for bucket in rank.buckets:
            rank.drawn.append(bucket)
            yield bucket

    rank._learner = SimpleNamespace(is_exporter=True, weights=weights)
    return rank


def send(rank, buckets, engines):
    rank.buckets = buckets
    return rank.send_weights(SYNC, engines, "logs")


def test_the_engines_are_met_once_and_again_when_they_are_others(rank) -> None:
    for engines in ({"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1}, {"a": 9}):
        assert send(rank, ["first", "second"], engines) == "first"
    assert [link.names for link in Link.made] == [["a", "b"], ["a"], ["a"]]
    assert [link.closed for link in Link.made] == [1, 1, 0]
    rank.close_link()
    rank.close_link()
    assert Link.made[-1].closed == 1


def test_after_a_failure_every_bucket_was_drawn_and_the_engines_are_met_anew(rank) -> None:
    """Gathering is collective: the other ranks wait in the second bucket's gather for this one."""
    with pytest.raises(TransferFailed):
        send(rank, ["bad", "second", "third"], {"a": 1})
    assert rank.drawn == ["bad", "second", "third"]
    assert send(rank, ["good"], {"a": 1}) == "good"
    assert [link.closed for link in Link.made] == [1, 0]


@pytest.mark.parametrize(
    ("chosen", "exporters", "engines", "sent"),
    [
        (True, None, {"a": 1}, "first"),
        (False, None, {"a": 1}, None),  # every rank is told of the engines, and the learner's choice sends
        (False, [0, 4], {"a": 1}, "first"),
        (True, [0, 4], {}, None),  # all engines of its host have died, say
    ],
)
def test_the_learners_exporter_sends_unless_some_ranks_have_engines_of_their_own(
    rank, chosen, exporters, engines, sent
) -> None:
    rank._learner.is_exporter, rank.buckets = chosen, ["first", "second"]
    assert rank.send_weights(SYNC, engines, "logs", exporters) == sent
    assert (rank.told, rank.drawn[-1], len(Link.made)) == (exporters, "second", sent is not None)
