"""A rank that is stuck in the middle of a call: who says so, how soon, and what is left. Real gloo."""

from __future__ import annotations

import pickle
import sys
import time
from datetime import timedelta

import pytest
import ray
import torch
from torch import distributed as dist

from gspo_dist.actors import learner_group
from gspo_dist.actors.learner_group import RayLearnerGroup
from gspo_dist.config import LearnerConfig
from gspo_dist.failures import CollectiveTimeout
from gspo_dist.packing import MiniBatch

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

COLLECTIVE_S = 1.0
"""Longest wait of a call that computes."""
BUSY_S = 2.0
"""What one rank may be busy with in other calls."""


class Slow:
    """Two ranks that sum in a group of their own. The second sleeps first, for as long as it is told."""

    is_exporter, policy_version = False, 0

    def __init__(self, rank, world_size, master_addr, master_port):
        self.rank = self.data_parallel_rank = rank
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{master_addr}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600),
        )
        self.own = dist.new_group([0, 1], group_desc="of_its_own")

    def _sum(self, seconds):
        if self.rank == 1:
            time.sleep(seconds)
        dist.all_reduce(torch.ones(3), group=self.own)

    def forward_backward(self, batches, spec):
        self._sum(spec)
        return {}

    def save(self, folder):
        self._sum(BUSY_S)


def test_a_stuck_rank_is_named_with_the_collective_that_waits_for_it(ray_here, tmp_path, monkeypatch):
    """Calls that may rightly wait for one rank do: the first of a kind, and a save."""
    monkeypatch.setattr(learner_group, "SILENCE_S", 4.0)
    config = LearnerConfig(
        backend="deepspeed", world_size=2, timeout_s=60.0, collective_timeout_s=COLLECTIVE_S
    )
    group = RayLearnerGroup(config, Slow, [{"num_cpus": 0}] * 2, tmp_path / "logs")
    group.start()
    mini = MiniBatch(((), ()), None)
    group.forward_backward(mini, BUSY_S)
    group.save(tmp_path)
    begun = time.monotonic()
    with pytest.raises(CollectiveTimeout) as caught:
        group.forward_backward(mini, 60.0)
    assert time.monotonic() - begun < COLLECTIVE_S + 20.0
    group.close()
    assert str(caught.value).startswith(
        "learner-0 waited 1 s (learner.collective_timeout_s) in gloo:all_reduce of [[3]], number 3 of group "
        "of_its_own, called at test_stuck_rank.py:"
    )
    assert "(_sum): " in str(caught.value)
    notes = "\n".join(caught.value.__notes__)
    assert "learner-1 has not answered at all: the others wait for it" in notes
    assert "learner-0 has not answered" not in notes
    stack = notes.partition("the others wait for it\n  it was at\n")[2].splitlines()
    assert [line.rpartition(" in ")[2] for line in stack[:2]] == ["_sum", "forward_backward"]
    dump = tmp_path / "logs" / "flight_recorder" / "rank_0"
    assert f"dumps of the flight recorder: {dump}; compare" in notes
    trace = pickle.loads(dump.read_bytes())
    assert {(group["desc"], group["ranks"]) for group in trace["pg_config"].values()} == {
        ("default_pg", "[0, 1]"),
        ("of_its_own", "[0, 1]"),
    }
    assert [entry["profiling_name"] for entry in trace["entries"]][-1] == "gloo:all_reduce"
