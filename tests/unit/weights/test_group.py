"""Laws of the group: who meets whom and how long each waits, on a clock of the test; then gloo for real."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import PrefixStore, Store

from gspo_dist.weights import group as groups
from gspo_dist.weights.group import (
    GlooBroadcast,
    GlooGroup,
    Meeting,
    MissingRanks,
    NcclBroadcast,
    NcclGroup,
    TransferFailed,
    address_towards,
    require_nccl,
)
from gspo_dist.weights.verify import WeightSyncError

HERE = "127.0.0.1"
NAME = socket.gethostname()


def later(work: Callable, *args) -> Future:
    """A thread that does not hold the process when `work` hangs."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Clock:
    """Stands still until a wait moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(groups, "time", clock)
    return clock


class Book(Store):
    """A store that writes down what it is asked. A key waited for takes `takes` seconds, or is absent."""

    def __init__(
        self, clock: Clock, takes: float = 0.0, absent: tuple[str, ...] = (), why: str = "?"
    ) -> None:
        super().__init__()
        self.clock, self.takes, self.absent, self.why = clock, takes, absent, why
        self.asked: list[tuple] = []

    def set(self, key, value) -> None:
        self.asked.append(("set", key, value))

    def get(self, key) -> bytes:
        self.asked.append(("get", key))
        return bytes(range(128)).hex().encode()

    def wait(self, keys, limit) -> None:
        seconds = limit.total_seconds()
        self.asked.append(("wait", list(keys), round(seconds, 6)))
        if keys[0] in self.absent:
            self.clock.now += seconds
            raise RuntimeError(self.why)
        self.clock.now += self.takes


@pytest.fixture
def connected(monkeypatch) -> list[tuple]:
    """What each backend was told, in place of connecting."""
    told: list[tuple] = []
    for kind in ("GlooGroup", "NcclGroup"):
        monkeypatch.setattr(groups, kind, lambda *args, kind=kind: told.append((kind, *args)) or kind)
    return told


def meeting(backend: str = "gloo", port: int = 5, world: int = 4, seconds: float = 10.0) -> Meeting:
    return Meeting(backend, HERE, port, world, seconds)


# The rendezvous


@pytest.mark.parametrize(("backend", "kind"), [("gloo", "GlooGroup"), ("nccl", "NcclGroup")])
def test_rank_0_waits_for_each_other_rank_says_that_all_are_there_and_connects(
    backend, kind, clock, connected
):
    """8 of the 10 seconds are its own, and each rank that comes takes one of them."""
    store = Book(clock, takes=1.0)
    assert groups.join(meeting(backend), 0, store) == kind
    assert store.asked == [
        ("set", "rank/0", NAME),
        ("wait", ["rank/1"], 8.0),
        ("wait", ["rank/2"], 7.0),
        ("wait", ["rank/3"], 6.0),
        ("set", "all", "here"),
    ]
    [(made, prefixed, told, rank, left)] = connected
    assert (made, told, rank, left.total_seconds()) == (kind, meeting(backend), 0, pytest.approx(5.0))
    assert prefixed.underlying_store is store
    prefixed.set("k", "v")
    assert store.asked[-1] == ("set", f"{backend}/k", b"v")


def test_another_rank_says_that_it_is_there_and_waits_for_all(clock, connected):
    store = Book(clock, takes=4.0)
    groups.join(meeting(), 2, store)
    assert store.asked == [("set", "rank/2", NAME), ("wait", ["all"], 10.0)]
    assert connected[0][3:] == (2, timedelta(seconds=6))


def test_ranks_that_do_not_come_are_named_and_nobody_is_told_that_all_are_there(clock, connected):
    """The first one takes all the time; whether the others are there is still asked, for 10 ms each."""
    store = Book(clock, absent=("rank/1", "rank/3"))
    with pytest.raises(
        MissingRanks, match=r"^ranks \[1, 3\] did not come to the rendezvous of the weight sync$"
    ) as raised:
        groups.join(meeting(), 0, store)
    assert raised.value.ranks == [1, 3]
    assert store.asked == [
        ("set", "rank/0", NAME),
        ("wait", ["rank/1"], 8.0),
        ("wait", ["rank/2"], 0.01),
        ("wait", ["rank/3"], 0.01),
    ]
    assert connected == []


def test_whether_a_rank_comes_is_yes_or_no(clock):
    store = Book(clock, absent=("rank/1",))
    assert groups._comes(store, "rank/2", timedelta(seconds=1)) is True
    assert groups._comes(store, "rank/1", timedelta(seconds=1)) is False


def test_a_rank_that_does_not_meet_the_others_says_where_it_looked_and_why(clock, connected):
    """The first line of what torch said, and 300 letters of it."""
    store = Book(clock, absent=("all",), why="\n  " + "x" * 301 + "\nfrom frame 1\n")
    with pytest.raises(TransferFailed) as raised:
        groups.join(meeting("nccl"), 1, store)
    assert str(raised.value) == (
        f"rank 1 on {NAME} could not meet the learner's exporter by nccl at 127.0.0.1:5 within 10 s "
        f"({'x' * 300}); check that the hosts reach each other on any port, and GLOO_SOCKET_IFNAME or "
        "NCCL_SOCKET_IFNAME where a host has several networks"
    )
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_rank_that_meets_the_others_and_cannot_connect_says_so(clock, monkeypatch):
    def refused(*args):
        raise RuntimeError("no route")

    monkeypatch.setattr(groups, "GlooGroup", refused)
    with pytest.raises(
        TransferFailed,
        match=rf"^rank 1 on {NAME} could not connect to the other ranks by gloo at .* \(no route\); check",
    ):
        groups.join(meeting(), 1, Book(clock))
    what = WeightSyncError("its own words")

    def unable(*args):
        raise what

    monkeypatch.setattr(groups, "GlooGroup", unable)
    with pytest.raises(WeightSyncError) as raised:
        groups.join(meeting(), 1, Book(clock))
    assert raised.value is what


def test_the_store_is_opened_on_a_free_port_with_the_time_of_the_meeting():
    one, two = groups.open_store(HERE, 7.0), groups.open_store(HERE, 8.0)
    assert one.port != two.port
    assert [one.timeout.total_seconds(), two.timeout.total_seconds()] == [7.0, 8.0]
    one.set("k", "v")
    assert one.get("k") == b"v"


def test_a_rank_without_a_store_finds_the_learners_at_its_port(clock, connected):
    """The clock of the test stands, so all of the ten seconds are left."""
    store = groups.open_store(HERE, 10.0)
    store.set("all", "here")
    groups.join(meeting(port=store.port), 3)
    assert store.get("rank/3").decode() == NAME
    assert connected[0][1].underlying_store.timeout == timedelta(seconds=10)


def test_a_port_that_nobody_answers_is_told_within_the_time():
    """A port that was free a moment ago, so that the host refuses."""
    with socket.create_server((HERE, 0)) as server:
        port = server.getsockname()[1]
    start = time.perf_counter()
    with pytest.raises(TransferFailed, match=rf"exporter by gloo at 127\.0\.0\.1:{port} within 1 s "):
        later(groups.join, meeting(port=port, seconds=0.6), 1).result(timeout=20)
    assert time.perf_counter() - start < 10


def test_the_address_is_the_one_that_reaches_the_other():
    """Nothing is sent: nobody listens there."""
    assert address_towards(HERE, 1) == HERE


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="the host has no IPv6")
def test_an_address_of_ipv6_is_reached_by_one():
    assert address_towards("::1", 1) == "::1"


# Gloo


def pair(seconds: float = 30.0) -> list[GlooGroup]:
    """Two ranks that met over a real store."""
    store = groups.open_store(HERE, 30.0)
    told = meeting(port=store.port, world=2, seconds=seconds)
    other = later(groups.join, told, 1)
    return [groups.join(told, 0, store), other.result(timeout=30)]


@pytest.fixture
def both():
    made = pair()
    yield made
    for group in made:
        if group.group is not None:
            group.close()


def test_what_rank_0_sends_is_what_the_other_gets(both):
    """Twice, so that the second is not the first one's."""
    for value in (3, 7):
        sent, taken = torch.full((1000,), value, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8)
        under_way = [both[1].broadcast(taken), both[0].broadcast(sent)]
        for each in under_way:
            each.wait(20.0)
        assert sent.tolist() == taken.tolist() == [value] * 1000
        assert [each.done() for each in under_way] == [True, True]
        assert [group.last for group in both] == under_way[::-1]
    assert GlooGroup.device == torch.device("cpu")


def test_a_broadcast_that_nobody_sends_is_not_done_and_is_given_up_in_time(both):
    waiting = both[1].broadcast(torch.zeros(10, dtype=torch.uint8))
    assert waiting.done() is False
    start = time.perf_counter()
    with pytest.raises(TransferFailed, match=r"^a bucket did not arrive by gloo within 0\.2 s$"):
        waiting.wait(0.2)
    assert 0.15 < time.perf_counter() - start < 5


def test_once_connected_a_broadcast_has_the_time_of_the_meeting_and_not_what_was_left_of_it(both):
    """At most 24 of the 30 seconds were left to rank 0."""
    assert [group.group.options._timeout for group in both] == [timedelta(seconds=30)] * 2


def test_who_connects_alone_gives_up_when_the_time_that_is_left_is_over():
    store = groups.open_store(HERE, 30.0)
    told = meeting(port=store.port, world=2, seconds=30.0)
    with pytest.raises(RuntimeError, match="timeout"):
        later(GlooGroup, PrefixStore("gloo", store), told, 0, timedelta(seconds=0.3)).result(timeout=15)


@pytest.mark.parametrize("named", ["lo", "lo,no-such-interface"])
def test_the_first_named_interface_is_the_one_that_gloo_takes(named, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    for group in pair():
        group.close()


def test_an_interface_that_the_host_lacks_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    store = groups.open_store(HERE, 5.0)
    told = meeting(port=store.port, world=2, seconds=5.0)
    other = later(groups.join, told, 1)
    with pytest.raises(TransferFailed, match=r"could not connect .* GLOO_SOCKET_IFNAME"):
        groups.join(told, 0, store)
    with pytest.raises(TransferFailed, match=r"could not connect .* GLOO_SOCKET_IFNAME"):
        other.result(timeout=20)


def test_gloo_listens_at_the_address_that_reaches_the_learner(monkeypatch):
    """And not at the one that the host's own name resolves to."""
    from torch.distributed import ProcessGroupGloo

    asked, create = [], ProcessGroupGloo.create_device
    monkeypatch.setattr(
        ProcessGroupGloo, "create_device", lambda **where: asked.append(where) or create(**where)
    )
    for group in pair():
        group.close()
    assert asked == [{"hostname": HERE}] * 2


class Held:
    """In the place of torch's group: says which thread destroyed it, once it may be."""

    def __init__(self) -> None:
        self.may, self.by = threading.Event(), []
        self.may.set()

    def __del__(self) -> None:
        self.may.wait(20)
        self.by.append(threading.current_thread().name)


def gloo(held: object, last: object) -> GlooGroup:
    """A group around `held`, with no network."""
    group = object.__new__(GlooGroup)
    group.group, group.last = held, last
    return group


@pytest.fixture
def closing(monkeypatch) -> list[threading.Thread]:
    mine: list[threading.Thread] = []
    monkeypatch.setattr(groups, "_closing", mine)
    return mine


@pytest.mark.parametrize("last", [None, SimpleNamespace(done=lambda: True)])
def test_an_idle_group_is_destroyed_when_it_is_closed(last, closing):
    held = Held()
    by, group = held.by, gloo(held, last)
    del held
    group.close()
    assert by == [threading.current_thread().name]
    assert (group.group, closing) == (None, [])


def test_a_group_whose_broadcast_is_under_way_is_destroyed_behind_its_callers_back(closing):
    """torch waits there. The thread must not hold the process by itself: the end of it waits a while only."""
    for turn in (1, 2):
        held = Held()
        by, may, group = held.by, held.may, gloo(held, SimpleNamespace(done=lambda: False))
        may.clear()
        del held
        group.close()
        assert (by, group.group, len(closing)) == ([], None, turn)
        assert closing[-1].daemon is True
        may.set()
        closing[-1].join(20)
        assert by == ["gloo-close"]


def test_a_process_that_ends_closes_the_groups_that_it_left_open(monkeypatch, closing):
    registered: list[tuple] = []
    monkeypatch.setattr(groups, "atexit", SimpleNamespace(register=lambda *told: registered.append(told)))
    made = pair()
    assert [leave for leave, _ in registered] == [groups._leave] * 2
    assert {id(ref()) for _, ref in registered} == {id(group) for group in made}
    for leave, ref in registered:
        leave(ref)
    assert [group.group for group in made] == [None, None]
    for leave, ref in registered:
        leave(ref)  # of a group that was closed before: nothing to do
    made.clear()
    gc.collect()
    assert [ref() for _, ref in registered] == [None, None]  # what waits for the end keeps no group alive
    for leave, ref in registered:
        leave(ref)


def test_a_group_that_was_closed_is_not_closed_again_at_the_end(closing):
    group = gloo(None, None)
    group.close = lambda: pytest.fail("closed twice")  # type: ignore[method-assign]
    groups._leave(weakref.ref(group))


def test_the_end_of_a_process_waits_five_seconds_for_all_that_are_closing(monkeypatch, clock):
    """Three threads that would take 3 seconds each: the third has none left, and is not waited for."""
    waited: list[float] = []

    def join(seconds: float) -> None:
        waited.append(seconds)
        clock.now += 3.0

    monkeypatch.setattr(groups, "_closing", [SimpleNamespace(join=join)] * 3)
    groups._wait_for_closing()
    assert waited == [5.0, 2.0, 0.0]


@pytest.mark.parametrize(("seconds", "told"), [(2.5, 2.5), (0.001, 0.001), (0.0, 0.001), (-3.0, 0.001)])
def test_a_wait_whose_time_is_over_still_looks_once(seconds, told):
    waited: list[float] = []
    GlooBroadcast(SimpleNamespace(wait=lambda limit: waited.append(limit.total_seconds()))).wait(seconds)
    assert waited == [told]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Timed Out waiting 500ms\nframe", "a bucket did not arrive by gloo within 2.5 s"),
        (
            "Connection closed by peer\nframe",
            "a bucket was lost on its way by gloo: Connection closed by peer",
        ),
        ("\nat a socket\n" + "x" * 400, "a bucket was lost on its way by gloo: at a socket"),
        ("y" * 400, f"a bucket was lost on its way by gloo: {'y' * 300}"),
        ("", "a bucket was lost on its way by gloo: RuntimeError('')"),
    ],
)
def test_a_broadcast_that_fails_says_whether_it_was_late_or_lost(said, message):
    def wait(limit):
        raise RuntimeError(said)

    with pytest.raises(TransferFailed) as raised:
        GlooBroadcast(SimpleNamespace(wait=wait)).wait(2.5)
    assert str(raised.value) == message
    assert str(raised.value.__cause__) == said


SEND_AND_END = """
import sys
import torch
from gspo_dist.weights.group import Meeting, join, open_store
store = open_store("127.0.0.1", 30.0)
print(store.port, flush=True)
group = join(Meeting("gloo", "127.0.0.1", store.port, 2, 30.0), 0, store)
under_way = group.broadcast(torch.ones(1 << 26, dtype=torch.uint8))  # more than a connection's buffers hold
assert not under_way.done()
if "close" in sys.argv:
    group.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "leave it open"])
def test_the_end_of_a_process_waits_for_the_broadcast_under_way(how):
    command = [sys.executable, "-c", SEND_AND_END, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        assert sender.stderr is not None
        group = groups.join(Meeting("gloo", HERE, int(sender.stdout.readline()), 2, 30.0), 1)
        time.sleep(1.0)
        assert sender.poll() is None
        taken = torch.zeros(1 << 26, dtype=torch.uint8)
        group.broadcast(taken).wait(30.0)
        assert sender.wait(30) == 0, sender.stderr.read()
        assert bool(taken.all())
        group.close()


# NCCL, as far as no GPU is needed


class Cuda:
    """Stands for vLLM's communicator, a stream and an event, in the order in which they are used."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.disabled = False

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.items()))


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    """A host that only looks as if it had a GPU. (test_collective has one with vLLM's own modules.)"""
    cuda = Cuda()
    vllm = "vllm.distributed.device_communicators"
    unique = SimpleNamespace(ncclGetUniqueId=lambda: bytes(range(128)))
    comm = SimpleNamespace(from_unique_id_bytes=lambda *told: cuda.calls.append(("met", *told)) or cuda)
    monkeypatch.setitem(sys.modules, f"{vllm}.pynccl", SimpleNamespace(PyNcclCommunicator=comm))
    monkeypatch.setitem(sys.modules, f"{vllm}.pynccl_wrapper", SimpleNamespace(NCCLLibrary=lambda: unique))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a new stream")
    monkeypatch.setattr(torch.cuda, "Event", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current stream")
    return cuda


@pytest.mark.parametrize("rank", [0, 1])
def test_nccl_meets_by_an_id_that_rank_0_writes(rank, cuda, clock):
    store = Book(clock)
    group = NcclGroup(store, meeting("nccl"), rank, timedelta(seconds=6))
    written = [("set", "id", bytes(range(128)).hex())] if rank == 0 else []
    assert store.asked == [*written, ("wait", ["id"], 6.0), ("get", "id")]
    device = torch.device("cuda", 3)
    assert cuda.calls == [("met", bytes(range(128)), rank, 4, device)]
    assert (group.device, group.comm, group.stream) == (device, cuda, "a new stream")


def test_a_communicator_without_nccl_is_refused(cuda, clock):
    require_nccl(SimpleNamespace(disabled=False))
    cuda.disabled = True
    with pytest.raises(WeightSyncError, match="VLLM_DISABLE_PYNCCL"):
        groups.join(meeting("nccl"), 1, Book(clock))


def test_an_nccl_broadcast_waits_for_its_packing_on_a_stream_of_its_own(cuda):
    group = object.__new__(NcclGroup)
    group.comm = group.stream = cuda
    buffer = SimpleNamespace(record_stream=lambda stream: cuda.calls.append(("kept", stream)))
    started = group.broadcast(buffer)
    assert cuda.calls == [
        ("wait_stream", "the current stream"),
        ("broadcast", buffer, ("src", 0), ("stream", cuda)),
        ("kept", cuda),
        ("record", cuda),
    ]
    assert isinstance(started, NcclBroadcast)
    assert started.event is cuda
    group.close()
    assert cuda.calls[-1] == ("destroy",)


def test_an_nccl_broadcast_whose_peer_is_dead_is_given_up(clock):
    """A second a look. At the fifth the time is not over yet, at the sixth it is; half a ms between two."""
    seconds = iter(range(100))
    event = SimpleNamespace(query=lambda: False)
    broadcast = NcclBroadcast(event, clock=lambda: next(seconds))
    with pytest.raises(TransferFailed, match=r"^a bucket did not arrive by nccl within 5 s$"):
        broadcast.wait(5.0)
    assert clock.slept == [0.0005] * 5
    assert broadcast.done() is False


def test_what_is_computed_after_an_nccl_broadcast_waits_for_its_bytes(clock, monkeypatch):
    """The event comes at the third look."""
    looks, waited = iter([False, False, True, True]), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=waited.append))
    event = SimpleNamespace(query=lambda: next(looks))
    broadcast = NcclBroadcast(event, clock=clock.monotonic)
    broadcast.wait(5.0)
    assert (waited, len(clock.slept)) == ([event], 2)
    assert broadcast.done() is True
