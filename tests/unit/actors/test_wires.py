"""What each pool asks of its actors, and how long it waits for them: no process is started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from gspo_dist.actors import learner_group, process, weight_link
from gspo_dist.actors.learner_group import LearnerRank, RayLearnerGroup
from gspo_dist.actors.process import ActorProcess, Actors
from gspo_dist.actors.reward_pool import GRACE_S, RayRewardPool, RewardWorker
from gspo_dist.actors.rollout_pool import RayRolloutPool
from gspo_dist.config import DeepSpeedConfig, LearnerConfig, RewardConfig, RolloutConfig, WeightSyncConfig
from gspo_dist.failures import Event
from gspo_dist.host import Place
from gspo_dist.learners.collectives import Watch
from gspo_dist.learners.learner import OptimStep
from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.packing import MiniBatch
from gspo_dist.rewards.pool import START_TIMEOUT_S
from gspo_dist.rollout.engine import EngineInfo, Growth, Progress
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import Completion, Prompt, SamplingSpec
from gspo_dist.weights.send import SentReport

LEARNER_S, ENGINE_S, SYNC_S = 7000.0, 8000.0, 9000.0
"""Longer than any wait of the package's own, so that a number says whose it is."""
SENT = SentReport({}, 2, 28, 0.0)
INFO = EngineInfo("engine", "cpu", 64, 100, 0, 0, 0, False, 2)
ANSWERS: dict[str, Callable[[], Any]] = {
    "sees": lambda: True,
    "host": lambda: ("10.0.0.1", 29600),
    "start": lambda: INFO,
    "optim_step": lambda: OptimStep(0.0, 0.5, 1),
    "send_weights": lambda: SENT,
    "export": lambda: 2,
    "forward_backward": lambda: {},
    "logprobs": lambda: [],
    "stop_profile": lambda: ["a trace", "a snapshot"],
    "advance": lambda: Progress(1, 2, {(5, 0): Completion(*[np.zeros(0)] * 4, "stop", "")}, Growth.of({})),
    "judge": lambda: ([], []),
}


class Handle:
    """Stands for an actor: every call is written down as (name, method, arguments)."""

    def __init__(self, calls: list[Any], options: dict[str, Any], *made: Any) -> None:
        self.calls, self.options, self.made = calls, options, made

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any, **kwargs: Any) -> str:
            self.calls.append((self.made[0], method, args, kwargs))
            return method

        return SimpleNamespace(remote=remote)


@pytest.fixture
def ray_calls(monkeypatch):
    """Ray without Ray: the calls of all actors, and (method, seconds) of every wait."""
    calls: list[Any] = []
    waits: list[tuple[str, float]] = []

    def remote(kind):
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *made: Handle(calls, options, *made))
        )

    def gather(self, refs, timeout):
        waits.extend({(method, timeout) for method in refs.values()})
        return {name: ANSWERS.get(method, lambda: None)() for name, method in refs.items()}

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(Actors, "gather", gather)
    monkeypatch.setattr(Actors, "each", lambda self, refs, timeout, **_: (gather(self, refs, timeout), {}))
    return calls, waits


def learners(folder: Path) -> RayLearnerGroup:
    config = LearnerConfig(
        backend="deepspeed", world_size=2, timeout_s=LEARNER_S, deepspeed=DeepSpeedConfig(expert_parallel=1)
    )
    group = RayLearnerGroup(config, lambda **_: None, [{"place": 0}, {"place": 1}], folder)
    group.replica_of = {"learner-0": 0, "learner-1": 1}
    return group


def engines(folder: Path) -> RayRolloutPool:
    config = RolloutConfig(engines=2, timeout_s=ENGINE_S)
    return RayRolloutPool(config, lambda **_: None, [{"place": 0}, {"place": 1}], folder)


def test_every_actor_gets_the_options_of_its_own_place(ray_calls, tmp_path) -> None:
    for pool in (learners(tmp_path), engines(tmp_path)):
        assert [handle.options for handle in pool.actors.handles.values()] == [{"place": 0}, {"place": 1}]
        assert [handle.made for handle in pool.actors.handles.values()] == [
            (name, str(tmp_path)) for name in pool.actors.handles
        ]
    assert learners(tmp_path).policy_version == 0
    rewards = RayRewardPool(RewardConfig(workers=2), tmp_path, {"PYTHONPATH": "/mine"})
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"PYTHONPATH": "/mine"}}}
    assert [handle.options for handle in rewards.actors.handles.values()] == [options] * 2


def test_learner_verbs_wait_as_long_as_the_learner_may_take(ray_calls, tmp_path) -> None:
    _, waits = ray_calls
    group = learners(tmp_path)
    group.logprobs(((), ()))
    group.forward_backward(MiniBatch(((), ()), Denominators(1, 1, 1)), "spec")
    assert group.optim_step() == OptimStep(0.0, 0.5, 1)
    assert group.policy_version == 1
    group.export(tmp_path, tmp_path)
    group.save(tmp_path)
    group.load(tmp_path, 3)
    group.wait_saved()
    group.sleep()
    group.wake_up()
    group.start_profile([1])
    group.stop_profile([1], tmp_path)
    assert len(waits) == 11
    assert {seconds for _, seconds in waits} == {LEARNER_S}


def test_learner_verbs_reach_every_rank_with_their_arguments(ray_calls, tmp_path) -> None:
    calls, _ = ray_calls
    group = learners(tmp_path)
    group.save(tmp_path / "new")
    group.load(tmp_path / "old", 3)
    assert group.policy_version == 3
    group.wait_saved()
    group.sleep()
    group.sleep(keep_weights=True)
    group.wake_up()
    group.wake_up(weights_only=True)
    assert group.peak_memory() == {"learner-0": None, "learner-1": None}
    assert group.places() == {"learner-0": None, "learner-1": None}
    group.start_profile([1])
    assert group.stop_profile([1], tmp_path) == [Path("a trace"), Path("a snapshot")]
    group.forward_backward(MiniBatch((("a",), ("b",)), Denominators(1, 1, 1)), "spec")
    asked = {name: [(m, args) for who, m, args, _ in calls if who == name] for name in group.actors.handles}
    both = [
        ("save", (f"{tmp_path}/new",)),
        ("load", (f"{tmp_path}/old",)),
        ("wait_saved", ()),
        ("sleep", (False,)),
        ("sleep", (True,)),
        ("wake_up", (False,)),
        ("wake_up", (True,)),
        ("peak_memory", ()),
        ("place", ()),
    ]
    profiled = [("start_profile", ()), ("stop_profile", (str(tmp_path), "rank-1"))]
    assert asked["learner-0"] == [*both, ("forward_backward", (["a"], "spec"))]
    assert asked["learner-1"] == [*both, *profiled, ("forward_backward", (["b"], "spec"))]


def test_ranks_are_built_within_the_learners_time_at_one_address(ray_calls, tmp_path) -> None:
    calls, waits = ray_calls
    group = learners(tmp_path)
    group.start()
    assert waits == [("host", learner_group.START_TIMEOUT_S), ("start", LEARNER_S)]
    started = [(name, args) for name, method, args, _ in calls if method == "start"]
    assert started == [
        (f"learner-{rank}", (group.make, group.config, rank, ("10.0.0.1", 29600))) for rank in range(2)
    ]


def test_a_publication_waits_as_long_as_the_sync_may_take(ray_calls, tmp_path) -> None:
    calls, waits = ray_calls
    sync = WeightSyncConfig(timeout_s=SYNC_S)
    assert learners(tmp_path).send_weights(sync, {"engine-0": "handle"}) == SENT
    pool = engines(tmp_path)
    pool.starting = {}  # all are up
    pool.start_weight_update(SYNC_S)
    pool.finish_weight_update(3, SYNC_S)
    pool.logprobs_of([np.arange(3)], SYNC_S)
    assert waits == [
        (method, SYNC_S)
        for method in ("send_weights", "start_weight_update", "finish_weight_update", "logprobs_of")
    ]
    assert [args for _, method, args, _ in calls if method == "send_weights"] == [
        (sync, {"engine-0": "handle"}, str(tmp_path))
    ] * 2


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_colocated_engines_hear_from_their_own_rank_unless_the_transport_crosses_hosts(
    ray_calls, tmp_path, transport
) -> None:
    """Of three engines on two hosts one is not alive."""
    calls, _ = ray_calls
    group = learners(tmp_path)
    group.exporters = {"engine-0": 0, "engine-1": 1, "engine-2": 1}
    sync, alive = WeightSyncConfig(transport=transport), {"engine-0": "near", "engine-2": "far"}
    group.send_weights(sync, alive)
    sent = {rank: args[1:] for rank, method, args, _ in calls if method == "send_weights"}
    if transport == "auto":
        assert sent["learner-0"] == ({"engine-0": "near"}, str(tmp_path), [0, 1])
        assert sent["learner-1"] == ({"engine-2": "far"}, str(tmp_path), [0, 1])
    else:
        assert sent == {f"learner-{rank}": (alive, str(tmp_path)) for rank in range(2)}


def test_engine_verbs_wait_as_long_as_the_engines_may_take(ray_calls, tmp_path) -> None:
    _, waits = ray_calls
    pool = engines(tmp_path)
    pool.start()
    pool.generate([Prompt("p", (1,), "q")], SamplingSpec(n=1, max_tokens=2), [5])
    pool.sleep()
    pool.wake_up()
    assert waits == [
        ("start", ENGINE_S),
        ("submit", ENGINE_S),
        ("advance", ENGINE_S + 1.0),  # a slice is of one second
        ("sleep", ENGINE_S),
        ("wake_up", ENGINE_S),
    ]


def test_rewards_are_given_the_time_of_all_their_rollouts_and_no_routes(ray_calls, tmp_path) -> None:
    """Three rollouts on two workers are chunks of two and one; each may also cost the start of a process."""
    calls, waits = ray_calls
    pool = RayRewardPool(RewardConfig(workers=2, timeout_s=1000.0), tmp_path)
    pool.start()
    columns = np.zeros(1, np.int64), np.ones(1, bool), np.zeros(1, np.float32), np.zeros(1, np.int32)
    trace = RoutingTrace(np.zeros((2, 1, 2), np.uint8), np.ones(2, bool), 8)
    completion = Completion(*columns, "stop", "7", trace)
    pool.judge([(i, Prompt("p", (1,), "q"), completion) for i in range(3)])
    assert waits == [
        ("start", START_TIMEOUT_S + GRACE_S),
        ("judge", (1000.0 + START_TIMEOUT_S) * 2 + GRACE_S),
    ]
    chunks = [args[0] for _, method, args, _ in calls if method == "judge"]
    assert [[i for i, _, _ in chunk] for chunk in chunks] == [[0, 1], [2]]
    assert all(sent == replace(completion, routing=None) for chunk in chunks for _, _, sent in chunk)


def test_a_reward_worker_has_one_process_and_tells_what_became_of_it(monkeypatch, tmp_path) -> None:
    made, event = [], Event("restart", "reward process", "ended with 3")
    below = SimpleNamespace(
        start=lambda: made.append("started"),
        judge=lambda items: [f"verdict of {item}" for item in items],
        take_events=lambda: [event],
    )
    monkeypatch.setattr(
        "gspo_dist.actors.reward_pool.LocalRewardPool", lambda config: made.append(config) or below
    )
    monkeypatch.setattr(ActorProcess, "__init__", lambda self, name, log_dir: setattr(self, "name", name))
    config = RewardConfig(workers=4, timeout_s=3.0)
    worker = RewardWorker("reward-0", str(tmp_path), config)
    worker.start()
    assert (worker.name, made) == ("reward-0", [replace(config, workers=1), "started"])
    assert worker.judge(["a", "b"]) == (["verdict of a", "verdict of b"], [event])


class Learner:
    """The exporter or another rank of a learner with two tensors."""

    def __init__(self, exporter: bool) -> None:
        self.is_exporter, self.asked, self.drawn = exporter, [], 0

    def weights(self, bucket_bytes, *, stacked=False):
        self.asked.append(bucket_bytes)
        for name in ("a", "b"):
            self.drawn += 1
            yield [(name, torch.ones(3))]


def rank_of(learner) -> LearnerRank:
    rank = object.__new__(LearnerRank)
    rank.name, rank._learner, rank._link = "learner-0", learner, None
    rank._watch = Watch("learner-0", Path("logs"), 60.0, 60.0)
    return rank


@pytest.mark.parametrize("check", [True, False])
def test_a_publication_uses_the_buckets_the_check_and_the_time_of_its_settings(
    ray_calls, monkeypatch, tmp_path, check
) -> None:
    calls, waits = ray_calls
    told = []

    def hear_all(engines, refs, deadline):
        told.append((list(refs.values()), deadline - time.monotonic()))

    monkeypatch.setattr(weight_link, "hear_all", hear_all)
    handles = {f"engine-{i}": Handle(calls, {}, f"engine-{i}") for i in range(2)}
    sync = WeightSyncConfig(transport="shm", bucket_mib=3, check=check, timeout_s=SYNC_S)
    learner = Learner(exporter=True)
    report = rank_of(learner).send_weights(sync, handles, str(tmp_path))
    assert report is not None
    assert (learner.asked, report.tensors, set(report.checksums)) == (
        [3 << 20],
        2,
        {"a", "b"} if check else set(),
    )
    # The exporter gives up before the trainer gives up on it, and an engine before the exporter.
    assert waits == [(method, pytest.approx(0.9 * SYNC_S, abs=5)) for method in ("sees", "init_weight_sync")]
    assert told == [(["update_weights"] * 2, pytest.approx(0.9 * SYNC_S, abs=5))] * 2
    asked = [args[0] for _, method, args, _ in calls if method == "update_weights"]
    assert [info["seconds"] for info in asked] == [pytest.approx(0.81 * SYNC_S, abs=5)] * 4
    assert [args for _, method, args, _ in calls if method == "init_weight_sync"] == [
        ({"transport": "shm", "check": check},)
    ] * 2


def test_the_other_ranks_draw_every_bucket_and_send_none(ray_calls, tmp_path) -> None:
    calls, _ = ray_calls
    learner = Learner(exporter=False)
    sync = WeightSyncConfig(transport="shm", bucket_mib=3)
    assert rank_of(learner).send_weights(sync, {}, str(tmp_path)) is None
    assert (learner.asked, learner.drawn, calls) == ([3 << 20], 2, [])


def test_the_log_takes_both_outputs_at_its_end(monkeypatch, tmp_path) -> None:
    """Errors too: a traceback of C++ or of a child goes to descriptor 2. What was printed before the log took
    over goes where it was printed to.
    """
    told = []
    path = tmp_path / "below" / "it" / "one.log"
    pipes = {name: SimpleNamespace(flush=lambda name=name: told.append(name)) for name in ("out", "err")}
    monkeypatch.setattr(process, "sys", SimpleNamespace(stdout=pipes["out"], stderr=pipes["err"]))
    real = {name: getattr(os, name) for name in dir(os)}
    moved = {"dup2": lambda log, to: told.append((os.write(log, b"x"), to))}
    monkeypatch.setattr(process, "os", SimpleNamespace(**(real | moved)))
    for _ in range(2):
        assert ActorProcess("one", str(path.parent)).name == "one"
    assert told == ["out", "err", (1, 1), (1, 2)] * 2
    assert path.read_text() == "xxxx"
    assert path.stat().st_mode & 0o133 == 0  # its owner writes it, and nobody runs it
    assert str(path) not in [os.readlink(f"/proc/self/fd/{number}") for number in open_descriptors()]


def open_descriptors() -> list[str]:
    return [number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]


def test_a_process_says_where_it_runs_and_what_it_took(monkeypatch) -> None:
    node = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.9")
    monkeypatch.setattr(process, "ray", SimpleNamespace(util=node))
    one = object.__new__(ActorProcess)
    addresses, ports = zip(*(one.host() for _ in range(3)), strict=True)
    assert set(addresses) == {"10.0.0.9"}
    assert min(ports) > 1023  # below are those of the system's services
    for told, gpus in (("4,6", ("4", "6")), ("", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        assert one.place() == Place("10.0.0.9", gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert one.place() == Place("10.0.0.9", ())
    # Bytes of whole pages: a Python process with torch takes more than 50 MiB, and no host of a test a TiB.
    peak = one.peak_memory()["host"]
    assert 50 << 20 < peak < 1 << 40
    assert peak % 4096 == 0
