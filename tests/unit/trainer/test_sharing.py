"""Who has the shared GPUs: every turn frees before it takes, and none needs more than its own."""

from __future__ import annotations

import itertools

import pytest

from gspo_dist.trainer.sharing import SharedGpus


class Gpu:
    """Learner and engines of one GPU, as sets of what is on it."""

    def __init__(self) -> None:
        self.held = {"learner weights", "learner states"}  # as after the start
        self.most: list[set[str]] = []
        self.engines = {"engine-0": self}

    def take(self, *what: str) -> None:
        self.held |= set(what)
        self.most.append(set(self.held))


class Learner(Gpu):
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def sleep(self, *, keep_weights: bool = False) -> None:
        self.gpu.held -= {"learner states"} if keep_weights else {"learner states", "learner weights"}

    def wake_up(self, *, weights_only: bool = False) -> None:
        self.gpu.take("learner weights", *([] if weights_only else ["learner states"]))


class Engines(Gpu):
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.engines = gpu, {"engine-0": gpu}

    def sleep(self) -> None:
        assert not ("engine weights" in self.gpu.held) ^ ("cache" in self.gpu.held), "half asleep"
        self.gpu.held -= {"engine weights", "cache"}

    def wake_up(self, weights_only: bool = False) -> None:
        self.gpu.take("engine weights", *([] if weights_only else ["cache"]))


HELD = {
    "learner": {"learner weights", "learner states"},
    "engines": {"engine weights", "cache"},
    "publication": {"learner weights", "engine weights"},
}


@pytest.mark.parametrize("way", itertools.permutations(HELD))
def test_every_turn_follows_every_other_and_nothing_else_is_on_the_gpu(way) -> None:
    gpu = Gpu()
    shared = SharedGpus(Learner(gpu), Engines(gpu), colocated=True)
    for turn in (*way, *way[::-1]):
        gpu.most = []
        getattr(shared, f"to_{turn}")()
        assert gpu.held == HELD[turn]
        assert all(held in HELD.values() or any(held < whole for whole in HELD.values()) for held in gpu.most)
        gpu.most = []
        getattr(shared, f"to_{turn}")()  # again
        assert gpu.most == []


def test_engines_with_gpus_of_their_own_never_sleep() -> None:
    shared = SharedGpus(None, None, colocated=False)
    shared.to_engines(), shared.to_publication(), shared.to_learner()
    assert shared.turn == "learner"


@pytest.mark.parametrize("turn", ["engines", "publication"])
def test_where_no_engine_is_left_the_learner_wakes_for_its_checkpoint(turn) -> None:
    gpu = Gpu()
    pool = Engines(gpu)
    shared = SharedGpus(Learner(gpu), pool, colocated=True)
    getattr(shared, f"to_{turn}")()
    gpu.held -= {"engine weights", "cache"}  # all of them die
    pool.sleep = pool.wake_up = lambda: None
    shared.to_learner()
    assert gpu.held == HELD["learner"]


class Slow:
    """Learner and engines whose verbs take so many seconds of a clock that nothing else moves."""

    def __init__(self, scale: float, now: list[float]) -> None:
        self.seconds = {"sleep": 1.0, "sleep, weights stay": 2.0, "wake": 4.0, "wake, weights": 8.0}
        self.scale, self.now, self.engines = scale, now, {"engine-0": None}

    def sleep(self, *, keep_weights: bool = False) -> None:
        self.now[0] += self.scale * self.seconds["sleep, weights stay" if keep_weights else "sleep"]

    def wake_up(self, *, weights_only: bool = False) -> None:
        self.now[0] += self.scale * self.seconds["wake, weights" if weights_only else "wake"]


def test_the_seconds_of_every_hand_over_are_told_once() -> None:
    now = [100.0]
    shared = SharedGpus(Slow(1.0, now), Slow(0.01, now), colocated=True, clock=lambda: now[0])
    assert set(shared.take_metrics().values()) == {0.0}
    shared.to_engines()  # learner sleeps 1, engines wake 0.04
    shared.to_learner()  # engines sleep 0.01, learner wakes 4
    now[0] += 1000.0  # an update
    shared.to_publication()  # learner sleeps but for its weights 2, engines wake in part 0.08
    now[0] += 1000.0
    shared.to_engines()  # 1 and 0.04
    shared.to_engines()
    told = shared.take_metrics()
    assert told == pytest.approx(
        {
            "time/switch_s": 8.17,
            "time/switch/learner_sleep_s": 4.0,
            "time/switch/learner_wake_s": 4.0,
            "time/switch/engines_sleep_s": 0.01,
            "time/switch/engines_wake_s": 0.16,
        }
    )
    shared.to_publication()  # engines sleep 0.01, the learner's weights wake 8, engines wake in part 0.08
    assert shared.take_metrics() == pytest.approx(
        {
            "time/switch_s": 8.09,
            "time/switch/learner_sleep_s": 0.0,
            "time/switch/learner_wake_s": 8.0,
            "time/switch/engines_sleep_s": 0.01,
            "time/switch/engines_wake_s": 0.08,
        }
    )


def test_without_colocation_no_hand_over_is_told() -> None:
    shared = SharedGpus(None, None, colocated=False)
    shared.to_engines(), shared.to_learner()
    assert shared.take_metrics() == {}
