"""Where a run's processes land when nodes are filled in order."""

from __future__ import annotations

import pytest

from gspo_dist.planner.layout import EngineLayout, LearnerLayout
from gspo_dist.planner.placement import where


@pytest.mark.parametrize(
    ("ranks", "engines", "size", "nodes", "expected"),
    [
        (16, 4, 4, 4, ["learner: 16 ranks of 1 GPU on nodes 1-2", "engines: 4 engines of 4 GPUs, on nodes 3-4", "free: 0 GPUs"]),
        (6, 1, 2, 1, ["learner: 6 ranks of 1 GPU on node 1", "engines: 1 engine of 2 GPUs, on node 1", "free: 0 GPUs"]),
        # 7 ranks leave one GPU of node 1, too few for an engine of 4; node 2 holds two
        (7, 2, 4, 2, ["learner: 7 ranks of 1 GPU on node 1", "engines: 2 engines of 4 GPUs, on node 2", "free: 1 GPU"]),
        (8, 3, 4, 2, ["learner: 8 ranks of 1 GPU on node 1", "engines: 3 engines of 4 GPUs, on node 2",
                      "not placed: 1 engine", "free: 0 GPUs"]),
    ],
)
def test_engines_follow_the_learner_and_stay_within_a_node(ranks, engines, size, nodes, expected):
    assert where(LearnerLayout(world_size=ranks), EngineLayout(engines, size), nodes, 8) == expected


def test_colocated_engines_take_no_gpus_of_their_own():
    lines = where(LearnerLayout(world_size=8), EngineLayout(8, colocated=True), 1, 8)
    assert lines[1:] == ["engines: 8 engines on the GPUs of the first 8 ranks", "free: 0 GPUs"]
