"""Where a run's processes land when nodes are filled in order."""

from __future__ import annotations

import pytest

from gspo_dist.models.shape import find_model
from gspo_dist.planner import find_gpu
from gspo_dist.planner.placement import engine_nodes, where
from tests.unit.planner.views import change, engine_of, learner_of, plan_of, work_of


@pytest.mark.parametrize(
    ("ranks", "engines", "size", "nodes", "expected"),
    [
        (
            16,
            4,
            4,
            4,
            [
                "learner: 16 ranks of 1 GPU on nodes 1-2",
                "engines: 4 engines of 4 GPUs, on nodes 3-4",
                "free: 0 GPUs",
            ],
        ),
        (
            6,
            1,
            2,
            1,
            ["learner: 6 ranks of 1 GPU on node 1", "engines: 1 engine of 2 GPUs, on node 1", "free: 0 GPUs"],
        ),
        # 7 ranks leave one GPU of node 1, too few for an engine of 4; node 2 holds two
        (
            7,
            2,
            4,
            2,
            ["learner: 7 ranks of 1 GPU on node 1", "engines: 2 engines of 4 GPUs, on node 2", "free: 1 GPU"],
        ),
        (
            8,
            3,
            4,
            2,
            [
                "learner: 8 ranks of 1 GPU on node 1",
                "engines: 3 engines of 4 GPUs, on node 2",
                "not placed: 1 engine",
                "free: 0 GPUs",
            ],
        ),
    ],
)
def test_engines_follow_the_learner_and_stay_within_a_node(ranks, engines, size, nodes, expected):
    assert where(learner_of(world_size=ranks), engine_of(engines, size), nodes, 8) == expected


def test_engines_that_find_no_node_do_not_fit_although_gpus_are_free():
    """6 ranks leave one GPU of node 1 and seven of node 2: eight for two engines of four, and one
    node for them."""
    learner, engine = learner_of(world_size=6, token_budget=10240), engine_of(2, 4)
    assert where(learner, engine, 2, 7)[-2:] == ["not placed: 1 engine", "free: 4 GPUs"]
    assert engine_nodes(learner, engine, 2, 7) == [2]
    work, model = work_of(), find_model("OLMoE-1B-7B")
    result = plan_of(change(learner, recompute="full"), engine, work, model, find_gpu("B300"), 2, 7)
    [problem] = result.problems
    assert problem == (
        "GPUs: 1 of 2 engines find no node with 4 free GPUs beside learner.world_size 6 on 2 x 7; "
        "add a node, or choose sizes that fill whole nodes"
    )
    assert plan_of(change(learner, recompute="full"), engine, work, model, find_gpu("B300"), 2, 8).fits


def test_colocated_engines_take_no_gpus_of_their_own():
    lines = where(learner_of(world_size=8), engine_of(8, colocated=True), 1, 8)
    assert lines[1:] == ["engines: 8 engines of 1 GPU, on the GPUs of the first 8 ranks", "free: 0 GPUs"]
    lines = where(learner_of(world_size=32), engine_of(15, 2, colocated=True), 4, 8)
    assert lines == [
        "learner: 32 ranks of 1 GPU on nodes 1-4",
        "engines: 15 engines of 2 GPUs, on the GPUs of the first 30 ranks",
        "free: 0 GPUs",
    ]
