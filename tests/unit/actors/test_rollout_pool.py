"""Laws of the engines as one: who samples what, in which order it comes back, and that every verb arrives."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import numpy as np
import pytest
import ray

from gspo_dist.actors import rollout_pool
from gspo_dist.actors.rollout_pool import RayRolloutPool
from gspo_dist.config import RolloutConfig
from gspo_dist.failures import ProcessTimeout
from gspo_dist.rollout.engine import EngineInfo, Growth, Progress, SyncReceipt
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.types import Completion, Prompt, SamplingSpec

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def completion(text, tokens=1, reason="stop"):
    return Completion(
        np.full(tokens, 7, np.int64),
        np.ones(tokens, bool),
        np.zeros(tokens, np.float32),
        np.zeros(tokens, np.int32),
        reason,
        text,
    )


class RecordingEngine:
    """Samples completions that say who made them, and keeps the calls that change it.

    A tick gives a token to each, and a completion has as many as its limit. device: how engine-1 ends.
    """

    def __init__(self, name, device):
        self.name, self.device, self.calls, self.work, self.ticks = name, device, [], [], 0

    def info(self):
        return EngineInfo(self.name, self.device, 64, 100, 0, 0, 0, False, 1)

    def submit(self, work):
        self.work += work

    def advance(self, ticks, seconds):
        if self.name == "engine-1" and self.ticks == 1:
            if self.device == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.device == "hangs":
                time.sleep(60)
            elif self.device == "breaks":
                raise OSError("a worker is gone")
        self.ticks += 1
        self.work = [item.extended(completion("", 1, "")) for item in self.work]
        parts = {item.key: completion("", 1, "") for item in self.work if item.left}
        done = {
            item.key: completion(f"{self.name} {item.prompt.prompt_id} {item.key}", len(item.so_far))
            for item in self.work
            if not item.left
        }
        self.work = [item for item in self.work if item.left]
        return Progress(1, len(done) + len(parts), done, Growth.of(parts))

    def withdraw(self):
        left, self.work = self.work, []
        return left

    def logprobs_of(self, sequences):
        if self.device == "broken":
            os._exit(1)
        return [np.full(len(s) - 1, float(self.name[-1]), np.float32) for s in sequences]

    def init_weight_sync(self, info):
        self.calls.append(("init_weight_sync", dict(info)))

    def start_weight_update(self):
        self.calls.append("start_weight_update")

    def update_weights(self, info):
        self.calls.append(("update_weights", dict(info)))

    def finish_weight_update(self, policy_version):
        # The receipt is the only way out: what was called before travels in the names of its checksums.
        names = {str(call): i for i, call in enumerate(self.calls)}
        return SyncReceipt(policy_version, names, len(names), 0, 0.0)

    def sleep(self):
        self.calls.append("sleep")

    def wake_up(self, weights_only=False):
        self.calls.append(("wake_up", weights_only))


def make(name, device="cpu"):
    return RecordingEngine(name, device)


@pytest.fixture(scope="module")
def pool(ray_here, tmp_path_factory):
    config = RolloutConfig(engines=2)
    pool = RayRolloutPool(config, make, [{"num_cpus": 0}] * 2, tmp_path_factory.mktemp("logs"))
    assert pool.start() == EngineInfo("engine-0", "cpu", 64, 100, 0, 0, 0, False, 1)
    yield pool
    pool.close()


def test_completions_come_back_in_the_order_of_the_prompts(pool):
    """The prompts weigh 13, 7 and 7: one engine takes the first, the other the two others."""
    prompts = [Prompt(f"p{i}", tuple(range(n)), "q") for i, n in enumerate((9, 3, 3))]
    groups = pool.generate(prompts, SamplingSpec(n=2, max_tokens=2), [70, 71, 72])
    assert [[c.text for c in group] for group in groups] == [
        ["engine-0 p0 (70, 0)", "engine-0 p0 (70, 1)"],
        ["engine-1 p1 (71, 0)", "engine-1 p1 (71, 1)"],
        ["engine-1 p2 (72, 0)", "engine-1 p2 (72, 1)"],
    ]


def test_one_prompt_leaves_an_engine_without_work(pool):
    groups = pool.generate([Prompt("p", (1, 2), "q")], SamplingSpec(n=1, max_tokens=2), [5])
    assert [[c.text for c in group] for group in groups] == [["engine-0 p (5, 0)"]]


def test_every_engine_answers_for_its_own_weights(pool):
    answers = pool.logprobs_of([np.arange(3), np.arange(2)], timeout=60)
    assert {name: [a.tolist() for a in arrays] for name, arrays in answers.items()} == {
        "engine-0": [[0.0, 0.0], [0.0]],
        "engine-1": [[1.0, 1.0], [1.0]],
    }


def test_every_verb_of_a_publication_reaches_every_engine_in_order(pool):
    pool.sleep()
    pool.wake_up(weights_only=True)
    pool.start_weight_update(timeout=60)
    for handle in pool.engines.values():
        ray.get([handle.init_weight_sync.remote({"rank": 1}), handle.update_weights.remote({"bucket": 2})])
    pool.wake_up()
    receipts = pool.finish_weight_update(9, timeout=60)
    assert list(receipts) == ["engine-0", "engine-1"]
    for receipt in receipts.values():
        assert receipt.policy_version == 9
        assert list(receipt.checksums) == [
            "sleep", "('wake_up', True)", "start_weight_update", "('init_weight_sync', {'rank': 1})",
            "('update_weights', {'bucket': 2})", "('wake_up', False)",
        ]  # fmt: skip


def test_memory_is_counted_per_engine(pool):
    assert {name: set(peak) for name, peak in pool.peak_memory().items()} == {
        "engine-0": {"host"},
        "engine-1": {"host"},
    }


def test_an_engine_that_dies_is_named(ray_here, tmp_path):
    def make_broken(name):
        return make(name, "broken")

    pool = RayRolloutPool(RolloutConfig(engines=1), make_broken, [{"num_cpus": 0}], tmp_path)
    pool.start()
    with pytest.raises(NoEngineLeft, match=r"^no engine is left \(engine-0: engine-0 died: "):
        pool.logprobs_of([np.arange(3)], timeout=60)
    pool.close()


def test_engines_are_asked_to_close_and_one_that_does_not_is_killed(ray_here, tmp_path, monkeypatch):
    """Only an engine that is asked removes what it shares with its workers. One of these is busy for long."""

    def make_closing(name):
        engine = make(name)
        hour = 3600 if name == "engine-1" else 0
        engine.close = lambda: time.sleep(hour) or (tmp_path / name).touch()
        return engine

    monkeypatch.setattr(rollout_pool, "CLOSE_S", 3.0)
    pool = RayRolloutPool(RolloutConfig(engines=2), make_closing, [{"num_cpus": 0}] * 2, tmp_path / "logs")
    pool.start()
    start = time.monotonic()
    pool.close()
    assert 2.5 < time.monotonic() - start < 30
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["engine-0"]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pool.engines["engine-1"].info.remote())
    pool.close()  # of dead engines: at once
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("end", ["killed", "hangs", "breaks"])
def test_the_work_of_an_engine_that_ends_in_the_middle_goes_on_at_the_others(ray_here, tmp_path, end):
    """SIGKILL, a hang past the deadline, an error inside: every completion is whole, none is lost."""

    def make_ending(name):
        return make(name, end)

    config = RolloutConfig(engines=2, timeout_s=4.0)
    pool = RayRolloutPool(config, make_ending, [{"num_cpus": 0}] * 2, tmp_path)
    pool.start()
    prompts = [Prompt(f"p{i}", (1, 2), "q") for i in range(4)]
    groups = pool.generate(prompts, SamplingSpec(n=2, max_tokens=5), range(4))
    assert [[c.text for c in group] for group in groups] == [
        [f"engine-0 p{i} ({i}, {j})" for j in range(2)] for i in range(4)
    ]
    assert all(len(c) == 5 for group in groups for c in group)
    assert pool.alive == ["engine-0"]
    [how] = pool.deaths.values()
    said = {
        "killed": "engine-1 died",
        "hangs": "engine-1 gave no answer within",
        "breaks": "a worker is gone",
    }
    assert said[end] in how
    pool.start_weight_update(timeout=60)
    assert list(pool.finish_weight_update(1, timeout=60)) == ["engine-0"]
    assert list(pool.engines) == ["engine-0"]
    pool.close()


class SharingEngine(RecordingEngine):
    """Writes down when it is up and when it has gone to sleep."""

    def __init__(self, name, events):
        super().__init__(name, "cpu")
        self.events = events
        self.note("up")

    def note(self, what):
        with self.events.open("a") as file:
            file.write(f"{self.name} {what}\n")

    def sleep(self):
        super().sleep()
        self.note("asleep")


def kill(handle):
    """Ends an actor, and returns when it has ended: Ray only sends the order."""
    ray.kill(handle)
    with contextlib.suppress(ray.exceptions.RayActorError):
        while True:
            ray.get(handle.info.remote(), timeout=60)


def test_a_successor_takes_its_gpu_only_in_the_engines_turn(ray_here, tmp_path):
    """An engine dies while the learner has the GPUs. Another starts in its place when the engines have them
    again. They are given away when it sleeps. Its weights wake for the publication, and it takes part."""
    events = tmp_path / "events"

    def make_sharing(name):
        if events.exists() and f"{name} up" in events.read_text():
            time.sleep(1.0)  # a successor takes its time
        return SharingEngine(name, events)

    pool = RayRolloutPool(RolloutConfig(engines=2), make_sharing, [{"num_cpus": 0}] * 2, tmp_path / "logs")
    try:
        pool.start()
        pool.sleep()
        first = ["engine-0 asleep", "engine-0 up", "engine-1 asleep", "engine-1 up"]
        assert sorted(events.read_text().splitlines()) == first
        kill(pool.engines["engine-1"])
        pool.sleep()  # where it is noticed
        pool.wake_up(weights_only=True)
        pool.start_weight_update(timeout=60)
        assert list(pool.finish_weight_update(1, timeout=60)) == ["engine-0"]
        assert (pool.postponed, pool.starting) == (["engine-1"], {})
        pool.wake_up()
        pool.sleep()
        assert [line for line in events.read_text().splitlines() if "engine-1" in line][2:] == [
            "engine-1 up",
            "engine-1 asleep",
        ]
        pool.wake_up(weights_only=True)
        pool.start_weight_update(timeout=60)
        told = pool.finish_weight_update(2, timeout=60)["engine-1"].checksums
        assert list(told) == ["sleep", "('wake_up', True)", "start_weight_update"]
    finally:
        pool.close()


def test_a_successor_that_hangs_does_not_keep_the_learner_off_its_gpus(ray_here, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_pool, "START_TIMEOUT_S", 0.0)
    up = tmp_path / "up"

    def make_hanging(name):
        if up.exists():
            time.sleep(600.0)
        return make(name)

    pool = RayRolloutPool(
        RolloutConfig(engines=1, timeout_s=5.0), make_hanging, [{"num_cpus": 0}], tmp_path / "logs"
    )
    try:
        while pool.starting:  # it may take longer than the timeout to come up
            with contextlib.suppress(ProcessTimeout):
                pool.start()
        pool.sleep()
        up.touch()
        kill(pool.engines["engine-0"])
        pool.wake_up()  # where it is noticed
        hanging = pool.actors.handles["engine-0"]
        pool.sleep()
        assert (pool.postponed, pool.starting, pool.attempts) == (["engine-0"], {}, {"engine-0": 2})
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(hanging.info.remote(), timeout=60)
        with pytest.raises(NoEngineLeft):
            pool.start_weight_update(timeout=60)
    finally:
        pool.close()
