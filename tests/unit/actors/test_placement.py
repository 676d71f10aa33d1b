"""What a layout asks of the cluster, and what is refused before anything waits."""

from __future__ import annotations

import pytest

from gspo_dist.actors import placement
from gspo_dist.actors.placement import Reservation, lay_out
from gspo_dist.cli.compose import run_config


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
