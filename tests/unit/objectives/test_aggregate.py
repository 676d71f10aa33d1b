"""Segments, denominators and the four aggregations."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.objectives import Denominators, Segments, get_objective
from tests.unit.objectives.cases import LIMIT, make_batch, reference, run


def test_segments_by_hand_and_in_any_order():
    s = Segments(torch.tensor([1, 0, 1]), 2)
    x = torch.tensor([1.0, 5.0, 3.0])
    assert s.lengths.tolist() == [1, 2]
    assert s.sum(x).tolist() == [5.0, 4.0]
    assert s.mean(x).tolist() == [5.0, 2.0]
    assert s.expand(torch.tensor([7.0, 8.0])).tolist() == [8.0, 7.0, 8.0]
    assert s.sum(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"expand takes \[S=2\]"):
        s.expand(x)


def test_a_sequence_that_is_empty_on_all_ranks_is_refused_and_one_empty_here_is_not():
    here = torch.tensor([0, 0])
    assert Segments(here, 2, lambda x: x + torch.tensor([0.0, 3.0])).lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="none for sequence 1"):
        Segments(here, 2, lambda x: x + torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.tensor([0, 0, 2]), 3), "none for sequence 1 of 3"),
        ((torch.tensor([0, 3]), 3), r"ids must lie in \[0, count=3\): got 0 to 3"),
        ((torch.tensor([-1, 0]), 1), "got -1 to 0"),
        ((torch.tensor([0.0]), 1), "ids must be int64"),
        ((torch.tensor([[0]]), 1), "ids must be int64"),
        ((torch.tensor([0]), 0), "count must be an int >= 1"),
        ((torch.tensor([], dtype=torch.int64), 1), "none for sequence 0"),
    ],
)
def test_bad_segments_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        Segments(*args)


@pytest.mark.parametrize("field", ["sequences", "tokens", "max_completion_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_denominators_are_refused_by_name(field, value):
    kwargs = {"sequences": 2, "tokens": 4, "max_completion_length": 8, field: value}
    with pytest.raises(ValueError, match=f"denominators.{field}"):
        Denominators(**kwargs)


def test_denominators_need_a_token_per_sequence():
    with pytest.raises(ValueError, match="tokens must be >= sequences"):
        Denominators(5, 4, 8)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant_length"])
def test_every_aggregation_equals_the_loops(aggregation):
    batch = make_batch(3)
    t = batch.tensors()
    objective = get_objective("grpo", aggregation=aggregation)
    result = run(objective, t, len(batch.lp))
    loss, _ = reference("grpo", aggregation, objective.resolved, batch, LIMIT)
    assert math.isclose(result.loss.item(), loss, rel_tol=1e-12)
