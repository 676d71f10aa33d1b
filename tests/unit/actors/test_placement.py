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


def test_a_shared_bundle_has_room_for_both_who_share_it(monkeypatch) -> None:
    made = layout("rollout=vllm", "cluster.colocated=true")
    asked = []
    monkeypatch.setattr(Reservation, "_reserve", lambda self, bundles, *rest: asked.extend(bundles))
    Reservation(made, 600.0, local=False)
    both = [
        (rank.cpus + engine.cpus, rank.gpus + engine.gpus)
        for rank, engine in zip(made.learners, made.engines, strict=True)
    ]
    assert [(bundle["CPU"], bundle["GPU"]) for bundle in asked] == both == [(2, 1.0)] * 2


def test_every_actor_is_pinned_to_its_bundle_with_the_gpus_of_its_kind(monkeypatch) -> None:
    made = layout("rollout=vllm", "rollout.tensor_parallel=4", "rollout.engines=1")
    groups = iter(("of the learners", "of the engines"))
    monkeypatch.setattr(Reservation, "_reserve", lambda self, *rest: next(groups))
    monkeypatch.setattr(
        placement,
        "PlacementGroupSchedulingStrategy",
        lambda placement_group, placement_group_bundle_index: (placement_group, placement_group_bundle_index),
    )
    places = Reservation(made, 600.0, local=False)
    for kind, index, cpus, gpus in (("learner", 1, 1, 1.0), ("engine", 0, 1, 4.0)):
        assert places.options(kind, index, {"MARK": "7"}) == {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": (f"of the {kind}s", index),
            "runtime_env": {"env_vars": {"MARK": "7"}},
        }


def test_what_was_granted_is_given_back_when_the_rest_is_not(monkeypatch) -> None:
    """Else a retry in the same cluster would find the learners' GPUs taken by nobody."""
    granted = iter((True, False))
    groups = [SimpleNamespace(wait=lambda seconds: next(granted)) for _ in range(2)]
    made, removed = iter(groups), []
    monkeypatch.setattr(placement, "placement_group", lambda bundles, strategy: next(made))
    monkeypatch.setattr(placement, "remove_placement_group", removed.append)
    monkeypatch.setattr(placement.ray, "available_resources", lambda: {"CPU": 3.0})
    with pytest.raises(RuntimeError, match="free are CPU 3, GPU 0"):
        Reservation(layout(), 1.0, local=False)
    assert removed == groups


def test_a_cluster_of_ones_own_is_quiet_small_and_not_nice(monkeypatch) -> None:
    started = []
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(placement.ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(placement, "_object_store_bytes", lambda: 123)
    quiet = {"RAY_DISABLE_DOCKER_CPU_WARNING": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    for found, niceness in (({}, "0"), ({"RAY_worker_niceness": "5"}, "5")):  # what is set already is kept
        monkeypatch.setattr(placement.os, "environ", found)
        assert start_ray(ClusterConfig()) is True
        assert found == {"RAY_worker_niceness": niceness, **quiet}
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    assert started == [{**options, "object_store_memory": 123}] * 2


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
