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
