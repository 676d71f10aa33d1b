"""The group of one local learner: forwards the verbs, and delivers the weights through shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_dist.config import WeightSyncConfig
from gspo_dist.learners.group import LearnerGroup, LocalLearnerGroup, hf_items
from gspo_dist.learners.learner import Learner, OptimStep
from gspo_dist.learners.parking import Held
from gspo_dist.metrics.stat import Stat
from gspo_dist.packing import MiniBatch
from gspo_dist.weights.shm import map_bucket

WEIGHTS = {name: torch.arange(n, dtype=torch.float32) for name, n in (("a", 3), ("b", 5), ("c", 2))}


class Recorder:
    """A learner that writes down what it is asked."""

    data_parallel_rank = 0
    is_exporter = True

    def __init__(self) -> None:
        self.policy_version = 7
        self.asked: list[Any] = []
        self.stacked: list[bool] = []
        self.weights_here, self.states_here = [torch.ones(2)], [torch.ones(3)]

    def logprobs(
        self,
        batches: Any,
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[Any]:
        self.asked.append((batches, record_routing, reference, *(["scores"] if record_scores else [])))
        return ["output"]

    def forward_backward(self, batches: Any, spec: Any) -> dict[str, Stat]:
        self.asked.append((batches, spec))
        return {"objective/loss": Stat.sum(torch.tensor([2.0, 0.5]))}

    def optim_step(self) -> OptimStep:
        self.policy_version += 1
        return OptimStep(0.5, 1e-3, self.policy_version)

    def weights(
        self, bucket_bytes: int, *, stacked: bool = False, exporters: Sequence[int] | None = None
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        self.stacked.append(stacked)
        self.asked.append(bucket_bytes)
        yield [("a", WEIGHTS["a"]), ("b", WEIGHTS["b"])]
        yield [("c", WEIGHTS["c"])]

    def held(self) -> Held:
        return Held(torch.device("cpu"), self.weights_here, self.states_here)

    def save(self, folder: Path) -> None:
        self.asked.append(("save", folder))

    def load(self, folder: Path) -> None:
        self.asked.append(("load", folder))

    def wait_saved(self) -> None:
        self.asked.append("wait_saved")

    def close(self) -> None:
        self.asked.append("close")


class Engine:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.opened: list[dict] = []
        self.got: dict[str, torch.Tensor] = {}

    def init_weight_sync(self, info: dict) -> None:
        self.opened.append(info)

    def update_weights(self, info: dict) -> None:
        self.got |= {name: tensor.clone() for name, tensor in map_bucket(info)}


def mini(*replicas: tuple) -> MiniBatch:
    return MiniBatch(tuple(replicas), denominators=None)  # type: ignore[arg-type]  # nobody reads it here


def sync(**changes: Any) -> WeightSyncConfig:
    return WeightSyncConfig(**{"transport": "shm", "bucket_mib": 2} | changes)


@pytest.fixture
def group() -> Iterator[LocalLearnerGroup]:
    group = LocalLearnerGroup(Recorder())
    yield group
    group.close()


def test_it_is_a_learner_group_around_a_learner() -> None:
    learner: Learner = Recorder()
    local: LearnerGroup = LocalLearnerGroup(learner)
    assert local.policy_version == 7


def test_the_one_replicas_batches_and_options_reach_the_learner(group: LocalLearnerGroup) -> None:
    assert group.logprobs((("z",),), record_scores=True) == [["output"]]
    assert group.learner.asked.pop() == (("z",), False, False, "scores")
    assert group.logprobs((("x", "y"),), record_routing=True) == [["output"]]
    group.logprobs((("x",),), reference=True)
    stats = group.forward_backward(mini(("z",)), "spec")  # type: ignore[arg-type]
    assert group.learner.asked == [(("x", "y"), True, False), (("x",), False, True), (("z",), "spec")]
    assert stats["objective/loss"].result() == 2.5


def test_a_mini_batch_for_two_replicas_is_not_for_one_learner(group: LocalLearnerGroup) -> None:
    with pytest.raises(ValueError, match="too many values"):
        group.logprobs((("x",), ("y",)))


def test_the_version_is_the_learners(group: LocalLearnerGroup) -> None:
    assert group.optim_step() == OptimStep(0.5, 1e-3, 8)
    assert group.policy_version == 8


def test_every_engine_gets_every_tensor_and_is_opened_once(group: LocalLearnerGroup) -> None:
    engines = {"engine-0": Engine(), "engine-1": Engine()}
    for _ in range(2):
        report = group.send_weights(sync(), engines)
        assert (report.tensors, report.bytes) == (3, 40)
        assert report.checksums.keys() == WEIGHTS.keys()
    assert group.learner.asked == [2 << 20, 2 << 20]
    assert group.learner.stacked == [True, True]
    for engine in engines.values():
        assert len(engine.opened) == 1
        assert engine.got.keys() == WEIGHTS.keys()
        assert all(torch.equal(engine.got[name], WEIGHTS[name]) for name in WEIGHTS)


def test_checksums_are_sent_only_when_they_are_asked_for(group: LocalLearnerGroup) -> None:
    engine = Engine()
    assert group.send_weights(sync(check=False), {"engine-0": engine}).checksums == {}
    assert engine.opened == [{"transport": "shm", "check": False}]


def test_a_learner_that_sleeps_does_nothing_and_with_its_weights_alone_what_needs_no_more(
    group: LocalLearnerGroup, tmp_path: Path
) -> None:
    of_states = {
        "forward_backward": lambda: group.forward_backward(mini(("z",)), "spec"),  # type: ignore[arg-type]
        "optim_step": group.optim_step,
        "save": lambda: group.save(Path("here")),
        "load": lambda: group.load(Path("there"), 7),
        "reference": lambda: group.logprobs((("z",),), reference=True),
    }
    of_weights = {
        "logprobs": lambda: group.logprobs((("z",),)),
        "send_weights": lambda: group.send_weights(sync(), {"engine-0": Engine()}),
    }
    export = {"export": lambda: group.export(tmp_path, tmp_path)}
    group.sleep()
    for call in (of_states | of_weights | export).values():
        with pytest.raises(RuntimeError, match="are in host memory: wake it up before it computes"):
            call()
    assert group.learner.asked == []
    group.wake_up(weights_only=True)
    for call in of_states.values():
        with pytest.raises(RuntimeError, match="the learner's states are in host memory"):
            call()
    for call in of_weights.values():
        call()
    group.wake_up()
    for call in of_states.values():
        call()


def test_another_transport_than_shared_memory_is_refused(group: LocalLearnerGroup) -> None:
    with pytest.raises(
        ValueError, match=r"got rollout\.weight_sync\.transport nccl; unset cluster\.in_process"
    ):
        group.send_weights(sync(transport="nccl"), {"engine-0": Engine()})


def test_states_and_the_end_reach_the_learner_once() -> None:
    group = LocalLearnerGroup(Recorder())
    group.start()
    group.save(Path("here"))
    group.load(Path("there"), 7)
    group.wait_saved()
    group.close()
    group.close()
    assert group.learner.asked == [("save", Path("here")), ("load", Path("there")), "wait_saved", "close"]


def test_an_export_streams_every_tensor_once_in_order() -> None:
    assert [name for name, _ in hf_items(Recorder())] == ["a", "b", "c"]
