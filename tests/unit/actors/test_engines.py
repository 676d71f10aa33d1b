"""What the process of an engine does with each verb."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from gspo_dist.actors.process import ActorProcess
from gspo_dist.actors.rollout_pool import EngineProcess
from gspo_dist.rollout.engine import EngineInfo

INFO = EngineInfo("engine", "cpu", 64, 100, 0, 0, 0, False, 2)


def test_a_colocated_engine_takes_the_gpus_of_its_ranks_before_it_is_built(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen = []

    def make(name):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(info=lambda: INFO)

    for gpus in ((), ("4", "6")):
        process = object.__new__(EngineProcess)
        process.name, process._engine = "engine-1", None
        process.start(make, gpus)
    assert seen == ["0", "4,6"]


def test_an_engine_process_builds_its_engine_under_its_name() -> None:
    engine = SimpleNamespace(info=lambda: INFO)
    engine_process = object.__new__(EngineProcess)
    engine_process.name, engine_process._engine = "engine-3", None
    asked = []

    def make(name):
        asked.append(name)
        return engine

    assert engine_process.start(make) is INFO
    assert (asked, engine_process.engine) == (["engine-3"], engine)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("info", ()),
        ("submit", (["work"],)),
        ("advance", (3, 0.5)),
        ("withdraw", ()),
        ("logprobs_of", (["tokens"],)),
        ("init_weight_sync", ({"rank": 1},)),
        ("start_weight_update", ()),
        ("update_weights", ({"bucket": 2},)),
        ("abandon_weight_update", ()),
        ("finish_weight_update", (9,)),
        ("sleep", ()),
        ("wake_up", (True,)),
    ],
)
def test_an_engine_process_hands_every_verb_to_its_engine(verb, arguments) -> None:
    told = []
    engine_process = object.__new__(EngineProcess)
    engine = SimpleNamespace(**{verb: lambda *given: told.append(given) or "its answer"})
    engine_process.name, engine_process._engine = "engine-3", engine
    answer = getattr(engine_process, verb)(*arguments)
    assert told == [arguments]
    answered = {"info", "advance", "withdraw", "logprobs_of", "finish_weight_update"}
    assert answer == ("its answer" if verb in answered else None)


@pytest.mark.parametrize("asleep", [False, True])
def test_an_engine_that_starts_in_the_learners_turn_leaves_the_gpus_once_it_is_up(
    monkeypatch, asleep
) -> None:
    monkeypatch.setattr(ActorProcess, "__init__", lambda self, name, log_dir: setattr(self, "name", name))
    told = []
    engine = SimpleNamespace(info=lambda: told.append("info") or INFO, sleep=lambda: told.append("sleep"))
    process = EngineProcess("engine-3", "logs")
    with pytest.raises(RuntimeError, match="engine-3 has no engine yet: call start first"):
        process.info()
    assert process.start(lambda name: told.append(name) or engine, asleep=asleep) is INFO
    assert told == ["engine-3", "info", *["sleep"] * asleep]


def test_only_who_shares_the_memory_sees_a_file(tmp_path) -> None:
    process = object.__new__(EngineProcess)
    (tmp_path / "here").write_text("token")
    assert process.sees(str(tmp_path / "here"), "token") is True
    assert process.sees(str(tmp_path / "here"), "another run's token") is False
    assert process.sees(str(tmp_path / "there"), "token") is False


def test_an_engine_wakes_whole_unless_its_weights_alone_are_asked_for() -> None:
    woken = []
    engine_process = object.__new__(EngineProcess)
    engine_process.name, engine_process._engine = "engine-3", SimpleNamespace(wake_up=woken.append)
    engine_process.wake_up()
    engine_process.wake_up(True)
    assert woken == [False, True]


def test_an_engine_closes_once() -> None:
    closed = []
    process = object.__new__(EngineProcess)
    process._engine = SimpleNamespace(close=lambda: closed.append(1))
    process.close()
    process.close()
    assert closed == [1]
