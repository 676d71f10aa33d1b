"""Where a rank stands, by numbers written out. tests/parity compares them with megatron-core's own."""

from __future__ import annotations

import pytest

from gspo_dist.config import DeepSpeedConfig, LearnerConfig, MegatronConfig
from gspo_dist.learners.coordinates import coordinates


def test_one_process_and_plain_replicas_have_nothing_but_their_replica():
    assert coordinates(LearnerConfig(backend="eager"), 0) == {"replica": 0}
    assert coordinates(LearnerConfig(backend="deepspeed", world_size=4), 3) == {"replica": 3}


def test_deepspeeds_expert_groups_are_consecutive_ranks():
    config = LearnerConfig(backend="deepspeed", world_size=8, deepspeed=DeepSpeedConfig(expert_parallel=4))
    assert [coordinates(config, rank)["expert"] for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert coordinates(config, 6) == {"replica": 6, "expert": 2}


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, {"tensor": 0, "replica": 0, "pipeline": 0, "expert": 0}),
        (7, {"tensor": 1, "replica": 3, "pipeline": 0, "expert": 3}),
        (13, {"tensor": 1, "replica": 2, "pipeline": 1, "expert": 1}),
    ],
)
def test_megatrons_ranks_count_tensor_then_replica_then_pipeline(rank, expected):
    layout = MegatronConfig(tensor_parallel=2, pipeline_parallel=2, expert_parallel=4)
    config = LearnerConfig(backend="megatron", world_size=16, megatron=layout)
    assert coordinates(config, rank) == expected


def test_context_ranks_stand_between_tensor_and_replica_and_experts_count_their_own_way():
    layout = MegatronConfig(
        tensor_parallel=2, context_parallel=2, expert_parallel=2, expert_tensor_parallel=2
    )
    config = LearnerConfig(backend="megatron", world_size=8, megatron=layout)
    assert [coordinates(config, rank)["context"] for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [coordinates(config, rank)["replica"] for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert coordinates(config, 6) == {
        "tensor": 0,
        "context": 1,
        "replica": 1,
        "expert_tensor": 0,
        "expert": 1,
    }
