"""The packed attention against softmax written out, and what it refuses to leave out."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from gspo_dist.learners import attention
from gspo_dist.learners.attention import PackedLayout, packed_attention

LENGTHS = (3, 5, 1)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
BORDERS = torch.tensor([0, 3, 8, 9], dtype=torch.int32)


def tensors(heads: int, kv_heads: int, dim: int = 4) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, n, sum(LENGTHS), dim, generator=g, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads)
    )


def attend(layout: PackedLayout, **asked: object) -> torch.Tensor:
    return packed_attention(torch.nn.Identity(), *tensors(4, 2), None, packed=layout, **asked)[0]


def test_the_layout_of_the_worked_example() -> None:
    layout = PackedLayout.of(torch.tensor([0, 2, 5]), torch.tensor([0, 1, 0, 1, 2]))
    assert layout.longest == 3
    assert layout.slots.tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_every_token_attends_to_its_own_sequence_up_to_itself(scaling: float | None) -> None:
    q, k, v = tensors(4, 2)
    got = attend(PackedLayout.of(BORDERS, POSITIONS), scaling=scaling)
    for t in range(9):
        first = t - int(POSITIONS[t])
        for head in range(4):
            keys, values = k[0, head // 2, first : t + 1], v[0, head // 2, first : t + 1]
            scores = keys @ q[0, head, t] * (scaling or 1 / math.sqrt(4))
            want = scores.softmax(0) @ values
            torch.testing.assert_close(got[0, t, head], want, rtol=1e-12, atol=1e-12)


def test_sequences_of_one_length_need_no_padding_and_give_the_same() -> None:
    q, k, v = (x[:, :, :8] for x in tensors(2, 2))
    borders, positions = torch.tensor([0, 4, 8]), torch.arange(4).repeat(2)
    together = PackedLayout.of(borders, positions)
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, packed=together)
    for s in (slice(0, 4), slice(4, 8)):
        alone = PackedLayout.of(torch.tensor([0, 4]), torch.arange(4))
        parts = (x[:, :, s] for x in (q, k, v))
        want, _ = packed_attention(torch.nn.Identity(), *parts, None, packed=alone)
        torch.testing.assert_close(out[:, s], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"softcap": 50.0}, "has a soft cap of its scores"),
        ({"s_aux": torch.zeros(4)}, "has sinks"),
        ({"sliding_window": 4}, "sees 4 tokens, and a sequence has 5"),
    ],
)
def test_what_it_does_not_have_is_refused(asked: dict[str, object], message: str) -> None:
    layout = PackedLayout.of(BORDERS, POSITIONS)
    with pytest.raises(ValueError, match=message):
        attend(layout, **asked)


def test_a_window_that_no_sequence_reaches_changes_nothing() -> None:
    layout = PackedLayout.of(BORDERS, POSITIONS)
    assert torch.equal(attend(layout, sliding_window=5, softcap=None, dropout=0.5), attend(layout))


def per_sequence(q, k, v, cu, cu_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch's kernel for packed sequences is documented to compute, with every argument used."""
    assert torch.equal(cu, cu_k)
    assert longest == longest_k == int(cu.diff().max())
    assert window_size == (-1, 0), "causal"
    assert enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for start, end in pairwise(cu.tolist()):
        one = (x[start:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4)])
def test_a_gpus_kernel_gets_what_the_cpu_computes_with(monkeypatch, heads, kv_heads) -> None:
    """Keys go in as they are, and are not repeated for the queries that share them."""
    q, k, v = tensors(heads, kv_heads)
    packed = PackedLayout.of(BORDERS, POSITIONS)
    given = []

    def kernel(*tensors, **options):
        given.append([x.shape[1] for x in tensors[:3]])
        return per_sequence(*tensors, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    got = attention._flash(q, k, v, 0.3, packed)
    want = attention._padded(q, k, v, 0.3, packed)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert given == [[heads, kv_heads, kv_heads]]


def test_torchs_kernel_takes_these_arguments() -> None:
    taken = inspect.signature(varlen.varlen_attn).parameters
    assert {"scale", "window_size", "enable_gqa"} <= taken.keys()
