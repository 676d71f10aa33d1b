"""The first meeting of learner and engines: whoever cannot come is heard at once, not after
the others' timeout."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from gspo_dist.actors import learner_group
from gspo_dist.actors.learner_group import LearnerRank
from gspo_dist.config import WeightSyncConfig
from gspo_dist.weights.nccl import NcclTransport, require_nccl
from gspo_dist.weights.verify import WeightSyncError

SYNC = WeightSyncConfig(transport="shm", timeout_s=60.0)


class Engines:
    """Stands for `Actors`: what came of the engines' side of the meeting."""

    def __init__(self, failure: Exception | None, after: float = 0.05) -> None:
        self.failure, self.after, self.over = failure, after, threading.Event()
        self.handles = {
            "engine-0": SimpleNamespace(init_weight_sync=SimpleNamespace(remote=lambda info: info))
        }

    def gather(self, refs, timeout):
        if self.failure is not None:
            self.over.wait(self.after)
            raise self.failure


def connect(monkeypatch, engines: Engines, meet) -> object:
    transport = SimpleNamespace(init_info=lambda i: i, connect=meet)
    monkeypatch.setattr(learner_group, "make_transport", lambda *a, **k: transport)
    assert LearnerRank._connect(object.__new__(LearnerRank), SYNC, engines) is transport
    return transport


def test_an_engine_that_fails_is_heard_while_the_rendezvous_waits(monkeypatch) -> None:
    over = threading.Event()
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="the engine's own words"):
        connect(monkeypatch, Engines(RuntimeError("the engine's own words")), lambda: over.wait(30))
    assert time.perf_counter() - start < 10
    over.set()


def test_where_this_side_failed_first_its_error_is_the_one_raised(monkeypatch) -> None:
    def broken() -> None:
        raise ValueError("no route to the engines")

    with pytest.raises(ValueError, match="no route to the engines"):
        connect(monkeypatch, Engines(TimeoutError("no answer from engine-0")), broken)
    with pytest.raises(ValueError, match="no route to the engines"):
        connect(monkeypatch, Engines(None), broken)
    waiting = Engines(TimeoutError("no answer from engine-0"), after=30)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no route to the engines"):
        connect(monkeypatch, waiting, broken)
    assert time.perf_counter() - start < 10  # the engines still wait for this side
    waiting.over.set()


def test_both_met(monkeypatch) -> None:
    met = []
    connect(monkeypatch, Engines(None), lambda: met.append(1))
    assert met == [1]


def test_every_worker_of_every_engine_gets_a_rank_of_its_own(monkeypatch) -> None:
    """Three engines of two GPUs each, as the engines say: ranks 1, 3 and 5 begin them, rank 0
    is the learner's.
    """
    told, asked = [], []

    class Several(Engines):
        def gather(self, refs, timeout):
            super().gather(refs, timeout)
            asked.append(list(refs))
            return refs

    engines = Several(None)
    engines.handles = {
        f"engine-{i}": SimpleNamespace(
            init_weight_sync=SimpleNamespace(remote=told.append),
            info=SimpleNamespace(remote=lambda: SimpleNamespace(workers=2)),
        )
        for i in range(3)
    }
    monkeypatch.setattr(NcclTransport, "connect", lambda self: None)
    rank = object.__new__(LearnerRank)
    monkeypatch.setattr(LearnerRank, "host", lambda self: ("10.0.0.1", 29600))
    transport = rank._connect(WeightSyncConfig(transport="nccl", timeout_s=60.0), engines)
    assert [info["rank_offset"] for info in told] == [1, 3, 5]
    assert {info["world_size"] for info in told} == {transport.world_size} == {7}
    assert {(info["master_address"], info["master_port"]) for info in told} == {("10.0.0.1", 29600)}
    assert asked == [["engine-0"], ["engine-0", "engine-1", "engine-2"]]


def test_a_communicator_without_nccl_is_refused() -> None:
    require_nccl(SimpleNamespace(disabled=False))
    with pytest.raises(WeightSyncError, match="VLLM_DISABLE_PYNCCL"):
        require_nccl(SimpleNamespace(disabled=True))
