"""What a layout asks of the cluster, and what is refused before anything waits."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import ray

from gspo_dist.actors import placement
from gspo_dist.actors.placement import Bundle, Layout, Reservation, cluster_gpus, lay_out, start_ray
from gspo_dist.cli.compose import run_config
from gspo_dist.config import ClusterConfig


def layout(*overrides: str, device: str = "cuda"):
    config = run_config(["learner.world_size=2", "rollout.engines=2", *overrides])
    return lay_out(config.cluster, config.learner, config.rollout, device)


@pytest.fixture
def reserved(monkeypatch):
    """The bundles and strategy of every placement group asked for, on a host of three GPUs."""
    asked = []

    class Group:
        def wait(self, timeout):
            return True

    def make(bundles, strategy):
        asked.append((strategy, sum(b.get("GPU", 0) for b in bundles)))
        return Group()

    monkeypatch.setattr(placement, "placement_group", make)
    monkeypatch.setattr(placement, "cluster_gpus", lambda: 3.0)
    return asked


def test_learners_and_engines_together_must_fit_a_host_that_is_alone(reserved) -> None:
    """Each part fits three GPUs; the second would wait for ever for what the first has taken."""
    with pytest.raises(ValueError, match=r"asks for 4 GPUs and this host has 3: .*cluster\.colocated=true"):
        Reservation(layout(), 600.0, local=True)
    assert reserved == []
    Reservation(layout(), 600.0, local=False)  # nodes may still join
    assert reserved == [("PACK", 2), ("PACK", 2)]


def test_colocation_is_one_host(reserved) -> None:
    Reservation(layout("cluster.colocated=true"), 600.0, local=True)
    assert reserved == [("STRICT_PACK", 2)]


def test_a_reference_engine_takes_no_gpu() -> None:
    assert [b.gpus for b in layout("rollout=reference").engines] == [0, 0]
    assert [b.gpus for b in layout("rollout=vllm", "rollout.tensor_parallel=4").engines] == [4, 4]
    assert [b.gpus for b in layout(device="cpu").learners] == [0, 0]


def bundles(*overrides: str, device: str):
    made = layout(*overrides, device=device)
    return [(b.cpus, b.gpus) for b in made.learners], [(b.cpus, b.gpus) for b in made.engines], made.colocated


@pytest.mark.parametrize(
    ("overrides", "device", "wanted"),
    [
        ([], "cpu", ([(0.01, 0.0)] * 2, [(0.01, 0.0)] * 2, False)),
        ([], "cuda", ([(1, 1.0)] * 2, [(1, 1.0)] * 2, False)),
        (["rollout.engines=1", "rollout.tensor_parallel=4"], "cuda", ([(1, 1.0)] * 2, [(1, 4.0)], False)),
        (["rollout=reference"], "cuda", ([(1, 1.0)] * 2, [(1, 0.0)] * 2, False)),
        (["cluster.colocated=true", "rollout.engines=1"], "cuda", ([(1, 0.5)] * 2, [(1, 0.5)], True)),
    ],
)
def test_what_every_actor_asks_for(overrides, device, wanted) -> None:
    assert bundles("rollout=vllm", *overrides, device=device) == wanted


def test_an_actor_without_a_gpu_asks_for_none() -> None:
    assert Bundle(2, 0).resources() == {"CPU": 2}
    assert Bundle(1, 0.5).resources() == {"CPU": 1, "GPU": 0.5}


@pytest.mark.parametrize(
    ("overrides", "device", "words"),
    [
        ([], "cpu", "cluster.colocated needs GPUs"),
        (
            ["rollout.tensor_parallel=2"],
            "cuda",
            "got rollout.tensor_parallel 2, 2 engines and 2 learner ranks",
        ),
        (["rollout.engines=3"], "cuda", "got rollout.tensor_parallel 1, 3 engines and 2 learner ranks"),
    ],
)
def test_a_colocation_that_cannot_be_is_refused(overrides, device, words) -> None:
    with pytest.raises(ValueError, match=words):
        layout("rollout=vllm", "cluster.colocated=true", *overrides, device=device)


@pytest.mark.parametrize(("total", "wanted"), [(1 << 28, 80 << 20), (10 << 30, 1 << 30), (1 << 40, 2 << 30)])
def test_the_object_store_takes_a_tenth_of_the_memory_within_bounds(monkeypatch, total, wanted) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))
    assert placement._object_store_bytes() == wanted


@pytest.mark.slow
def test_ray_is_joined_once_and_ended_by_whoever_started_it(ray_here) -> None:
    assert ray_here is True
    assert start_ray(ClusterConfig()) is False
    assert cluster_gpus() == 0.0


@pytest.mark.slow
def test_a_running_cluster_is_joined_and_left_running(ray_here, monkeypatch) -> None:
    joined = []
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(placement.ray, "init", lambda **options: joined.append(options["address"]))
    assert start_ray(ClusterConfig(address="auto")) is False
    assert joined == ["auto"]


@pytest.mark.slow
def test_an_actor_lands_in_its_bundle_with_its_environment(ray_here) -> None:
    made = layout("rollout=vllm", device="cpu")
    places = Reservation(made, 60.0, local=True)
    options = places.options("learner", 1, {"MARK": "7"})
    assert (options["num_cpus"], options["num_gpus"]) == (0.01, 0.0)
    strategy = options["scheduling_strategy"]
    assert (strategy.placement_group, strategy.placement_group_bundle_index) == (places.learners, 1)
    assert places.options("engine", 0, {})["scheduling_strategy"].placement_group == places.engines

    @ray.remote
    def mark():
        return os.environ["MARK"]

    assert ray.get(mark.options(**options).remote(), timeout=60) == "7"
    places.release()
    assert places.groups == []
    places.release()


@pytest.mark.slow
def test_what_the_cluster_does_not_grant_in_time_is_told_in_numbers(ray_here) -> None:
    made = Layout((Bundle(10_000, 0),), (), colocated=False)
    with pytest.raises(
        RuntimeError, match=r"did not grant \{'CPU': 10000, 'GPU': 0\} within 1 s: free are CPU \d"
    ):
        Reservation(made, 1.0, local=True)


def test_no_bundles_are_no_group(reserved) -> None:
    places = Reservation(Layout((Bundle(1, 0),), (), colocated=False), 1.0, local=True)
    assert places.engines is None
    assert reserved == [("PACK", 0)]
