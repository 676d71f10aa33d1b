"""A range of a flattened tensor as boxes of it, and where a factory's pieces lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from gspo_dist.learners.megatron import shares


def test_the_example_of_the_docstring() -> None:
    assert shares.boxes((4, 5), 3, 10) == [((0, 3), (1, 2)), ((1, 0), (1, 5))]


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4), (1, 6), (5, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_hold_the_range_once_and_in_order(shape: tuple[int, ...]) -> None:
    """Against the numbers of a tensor's own elements, for every range of it."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for end in range(start, numbers.size + 1):
            seen = []
            for offset, sizes in shares.boxes(shape, start, end):
                box = tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))
                assert numbers[box].shape == sizes
                seen.extend(numbers[box].flatten().tolist())
            assert seen == list(range(start, end))
            assert len(shares.boxes(shape, start, end)) <= 2 * len(shape) - 1


def fill(shape: tuple[int, ...], found: list[ShardedTensor]) -> torch.Tensor:
    """The whole tensor that the pieces make; an element that two of them hold, or none, is nan."""
    whole, times = torch.zeros(shape), torch.zeros(shape)
    for piece in found:
        sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        at = tuple(slice(o, o + s) for o, s in zip(piece.global_offset, sizes, strict=True))
        whole[at] += piece.data.view(sizes)
        times[at] += 1
    return torch.where(times == 1, whole, torch.nan)


@pytest.mark.parametrize("cut", [0, 1, 9, 17, 24])
def test_an_experts_pieces_lie_at_its_place(cut: int) -> None:
    """Expert 1 of 3, its matrix [4, 6] the second of two tensor shards, held by two ranks."""
    local = torch.randn(4, 6)
    sharded = ShardedTensor.from_rank_offsets("w", local, (0, 1, 3), (1, 1, 2), prepend_axis_num=1)
    found = []
    for start, end in ((0, cut), (cut, 24)):
        found += shares.pieces(sharded, "m", local.flatten()[start:end], start).values()
    assert {piece.key for piece in found} == {"m"}
    assert {piece.global_shape for piece in found} == {(3, 8, 6)}
    want = torch.full((3, 8, 6), torch.nan)
    want[1, 4:] = local
    torch.testing.assert_close(fill((3, 8, 6), found), want, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [0, 5, 20, 26, 40])
def test_pieces_of_gate_and_up_are_those_of_the_factory(cut: int) -> None:
    """Gate and up share a parameter [8, 5]; over tensor rank 1 of 2 each is half of its own tensor."""
    local = torch.randn(8, 5)
    factory = apply_swiglu_sharded_factory(
        ShardedTensor.from_rank_offsets("w", local, (0, 1, 2)), ((0, 1, 2),), False
    )
    wanted = list(factory.build())
    found = []
    for start, end in ((0, cut), (cut, 40)):
        found += shares.pieces(factory, "w", local.flatten()[start:end], start).values()
    assert {p.global_shape for p in found} == {w.global_shape for w in wanted}
    want = fill(wanted[0].global_shape, wanted)
    assert want.isnan().any()
    assert not want.isnan().all()
    torch.testing.assert_close(fill(want.shape, found), want, equal_nan=True, rtol=0, atol=0)


def test_pieces_are_views_so_that_a_load_reads_in_place() -> None:
    flat = torch.zeros(10)
    sharded = ShardedTensor.from_rank_offsets("w", torch.zeros(4, 5))
    for piece in shares.pieces(sharded, "w", flat, 3).values():
        piece.data.fill_(1.0)
    assert flat.tolist() == [1.0] * 10
