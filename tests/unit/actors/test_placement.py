"""What a layout asks of the cluster, and what is refused before anything waits."""

from __future__ import annotations

import os

import pytest
import ray

from gspo_dist.actors import placement
from gspo_dist.actors.placement import Bundle, Layout, Reservation, blocks, lay_out, spread
from gspo_dist.actors.session import Node
from gspo_dist.cli.compose import run_config


def layout(*overrides: str, device: str = "cuda"):
    config = run_config(["learner.world_size=2", "rollout.engines=2", *overrides])
    return lay_out(config.cluster, config.learner, config.rollout, device)


@pytest.fixture
def reserved(monkeypatch):
    """The bundles and strategy of every placement group asked for, on a host of three GPUs."""
    asked = []

    class Group:
        def __init__(self, size):
            self.size = size

        def wait(self, timeout):
            return True

    def make(bundles, strategy):
        asked.append((strategy, sum(b.get("GPU", 0) for b in bundles)))
        return Group(len(bundles))

    def table(group):
        return {"bundles_to_node_id": dict.fromkeys(range(group.size), "n1")}

    monkeypatch.setattr(placement, "placement_group", make)
    monkeypatch.setattr(placement, "placement_group_table", table)
    monkeypatch.setattr(placement, "nodes", lambda: [host(1)])
    monkeypatch.setattr(placement, "cluster_gpus", lambda: 3.0)
    return asked


def host(number: int, name: str | None = None) -> Node:
    return Node(f"n{number}", name or f"host{number}", f"10.0.0.{number}", 16, 8, 1 << 30)


def test_learners_and_engines_together_must_fit_a_host_that_is_alone(reserved) -> None:
    """Each part fits three GPUs; the second would wait for ever for what the first has taken."""
    with pytest.raises(ValueError, match=r"asks for 4 GPUs and this host has 3: .*cluster\.colocated=true"):
        Reservation(layout(), 600.0, local=True)
    assert reserved == []
    Reservation(layout(), 600.0, local=False)  # nodes may still join
    assert reserved == [("PACK", 2), ("PACK", 2)]


def test_a_host_is_asked_for_all_its_gpus_and_not_for_one_more(reserved) -> None:
    three = ("learner.world_size=3", "rollout.engines=1")
    Reservation(layout(*three, "cluster.colocated=true"), 600.0, local=True)
    Reservation(layout(*three, "rollout=reference"), 600.0, local=True)  # its engine has no GPU
    assert reserved == [("PACK", 3), ("PACK", 3), ("PACK", 0)]
    with pytest.raises(ValueError, match="asks for 4 GPUs and this host has 3"):
        Reservation(layout("learner.world_size=4", "cluster.colocated=true"), 600.0, local=True)
    assert len(reserved) == 3


def test_what_needs_no_gpu_runs_beside_fewer_of_them(reserved) -> None:
    Reservation(layout("learner.world_size=4", device="cpu"), 600.0, local=True)
    assert reserved == [("PACK", 0), ("PACK", 0)]


def test_colocated_ranks_are_packed_and_engines_ask_for_nothing_more(reserved) -> None:
    Reservation(layout("cluster.colocated=true"), 600.0, local=True)
    assert reserved == [("PACK", 2)]


def test_a_shared_bundle_has_room_for_both_who_share_it(monkeypatch) -> None:
    made = layout("rollout=vllm", "cluster.colocated=true")
    asked = []
    monkeypatch.setattr(Reservation, "_reserve", lambda self, bundles, *rest: asked.extend(bundles) or None)
    Reservation(made, 600.0, local=False)
    both = [
        (rank.cpus + engine.cpus, rank.gpus + engine.gpus)
        for rank, engine in zip(made.learners, made.engines, strict=True)
    ]
    assert [(bundle["CPU"], bundle["GPU"]) for bundle in asked] == both == [(2, 1.0)] * 2


def test_every_actor_is_pinned_to_its_bundle_with_the_gpus_of_its_kind(monkeypatch) -> None:
    made = layout("rollout=vllm", "rollout.tensor_parallel=4", "rollout.engines=1")
    places = {"learner": (5, 3), "engine": (7,)}  # the bundles of rank 0, rank 1 and engine 0
    groups = iter(placement.Granted(f"of the {k}s", b, ("host1",) * len(b)) for k, b in places.items())
    monkeypatch.setattr(Reservation, "_reserve", lambda self, *rest: next(groups))
    monkeypatch.setattr(
        placement,
        "PlacementGroupSchedulingStrategy",
        lambda placement_group, placement_group_bundle_index: (placement_group, placement_group_bundle_index),
    )
    places = Reservation(made, 600.0, local=False)
    for kind, index, bundle, cpus, gpus in (("learner", 1, 3, 1, 1.0), ("engine", 0, 7, 1, 4.0)):
        assert places.options(kind, index, {"MARK": "7"}) == {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": (f"of the {kind}s", bundle),
            "runtime_env": {"env_vars": {"MARK": "7"}},
        }


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
            "got rollout.tensor_parallel 2, 2 engines and 2 learner ranks; lower rollout.engines to 1",
        ),
        (["rollout.engines=3"], "cuda", "got rollout.tensor_parallel 1, 3 engines and 2 learner ranks"),
    ],
)
def test_a_colocation_that_cannot_be_is_refused(overrides, device, words) -> None:
    with pytest.raises(ValueError, match=words):
        layout("rollout=vllm", "cluster.colocated=true", *overrides, device=device)


def test_no_bundles_are_no_group(reserved) -> None:
    places = Reservation(Layout((Bundle(1, 0),), (), colocated=False), 1.0, local=True)
    assert places.engines is None
    assert reserved == [("PACK", 0)]


def test_processes_on_cpu_hosts_are_spread_in_order_ranks_first() -> None:
    """Each asks for a hundredth of a CPU, so Ray alone would put all of them on one host."""
    made = layout(device="cpu")
    for hosts, ranks, engines in (
        (1, "11", "11"),
        (2, "11", "22"),
        (3, "11", "23"),
        (4, "12", "34"),
    ):
        pinned = spread(made, [host(i + 1) for i in range(hosts)])
        assert [b.home for b in pinned.learners] == [f"10.0.0.{n}" for n in ranks]
        assert [b.home for b in pinned.engines] == [f"10.0.0.{n}" for n in engines]
    assert pinned.engines[1].resources() == {"CPU": 0.01, "node:10.0.0.4": 0.001}


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["learner.deepspeed.expert_parallel=4"], {"expert parallel": 4, "tensor and context parallel": 1}),
        (
            [
                "learner=megatron",
                "learner.megatron.tensor_parallel=2",
                "learner.megatron.context_parallel=4",
                "learner.megatron.expert_parallel=8",
                "learner.megatron.expert_tensor_parallel=1",
            ],
            {"expert parallel": 8, "tensor and context parallel": 8},
        ),
        (
            [
                "learner=megatron",
                "learner.megatron.expert_parallel=4",
                "learner.megatron.expert_tensor_parallel=2",
            ],
            {"expert parallel": 8, "tensor and context parallel": 1},
        ),
    ],
)
def test_blocks_are_the_groups_of_consecutive_ranks(overrides, wanted) -> None:
    assert blocks(run_config(["learner.world_size=16", *overrides]).learner) == wanted


@pytest.mark.slow
def test_an_actor_lands_in_its_bundle_with_its_environment(ray_here) -> None:
    made = layout("rollout=vllm", device="cpu")
    places = Reservation(made, 60.0, local=True)
    options = places.options("learner", 1, {"MARK": "7"})
    assert (options["num_cpus"], options["num_gpus"]) == (0.01, 0.0)
    strategy = options["scheduling_strategy"]
    assert (strategy.placement_group, strategy.placement_group_bundle_index) == (places.learners.group, 1)
    assert places.options("engine", 0, {})["scheduling_strategy"].placement_group == places.engines.group

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
