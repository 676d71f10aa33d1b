"""Batches laid out over context ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_dist.learners.megatron.layout import Layout
from gspo_dist.learners.megatron.rows import lay_out
from gspo_dist.types import PackedBatch


def make_batch(lengths: list[int], trained: torch.Tensor | None = None) -> PackedBatch:
    """Token ids 1, 2, 3, ...; all but each sequence's first token trained unless said otherwise."""
    total = sum(lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    return PackedBatch(
        token_ids=torch.arange(1, total + 1),
        position_ids=position,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        loss_mask=position > 0 if trained is None else trained,
        advantages=torch.zeros(total),
        rollout_logprobs=torch.zeros(total),
        rollout_index=torch.arange(len(lengths)),
    )


def layout(context: int = 1, tensor: int = 1) -> Layout:
    return Layout(context * tensor, tensor, 1, 1, 1, 1, context, tensor > 1)


def test_the_worked_example_of_the_module() -> None:
    """Six tokens over two context ranks, 3 to 5 trained: rows 0 1 6 7 and 2 3 4 5."""
    batch = make_batch([6], torch.tensor([False, False, False, True, True, True]))
    first, second = (lay_out(batch, layout(context=2), rank, "cpu") for rank in range(2))
    assert first.source.tolist() == [0, 1, -1, -1]
    assert second.source.tolist() == [2, 3, 4, 5]
    assert first.token_ids.tolist() == [[1, 2, 0, 0]]
    assert first.position_ids.tolist() == [[0, 1, 6, 7]]
    assert first.index.tolist() == []
    assert second.index.tolist() == [3, 4, 5]
    assert second.hidden_rows.tolist() == [0, 1, 2]
    assert second.labels.tolist() == [4, 5, 6]
    assert first.packed.cu_seqlens_q_padded.tolist() == [0, 8]
    assert first.packed.max_seqlen_q == first.packed.max_seqlen_kv == 8


def test_sequences_and_batch_are_padded_to_their_multiples() -> None:
    """Context 2 pads 6 and 3 to 8 and 4; tensor 4 needs 8 rows per rank, so a sequence of 4 is added."""
    rows = lay_out(make_batch([6, 3]), layout(context=2, tensor=4), 0, "cpu")
    assert rows.packed.cu_seqlens_q.tolist() == [0, 8, 12, 16]
    assert len(rows.source) == 8
    assert rows.padded
    exact = lay_out(make_batch([8, 4, 4]), layout(context=2, tensor=4), 0, "cpu")
    assert exact.packed.cu_seqlens_q.tolist() == [0, 8, 12, 16]
    assert not exact.padded


def test_the_padding_mask_marks_padding_and_is_cut_for_later_stages() -> None:
    cut = layout(tensor=2)
    rows = lay_out(make_batch([3]), cut, 0, "cpu")
    assert rows.padding_mask(cut, 0, True).tolist() == [[False, False, False, True]]
    assert [rows.padding_mask(cut, rank, False).tolist() for rank in range(2)] == [
        [[False, False]],
        [[False, True]],
    ]
    alone = layout()
    assert lay_out(make_batch([3]), alone, 0, "cpu").padding_mask(alone, 0, True) is None


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 17), min_size=1, max_size=6),
    context=st.sampled_from([1, 2, 3]),
    tensor=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_context_ranks_share_every_token_once(
    lengths: list[int], context: int, tensor: int, seed: int
) -> None:
    """Rows, trained tokens and their hidden rows over all ranks make up the batch, whatever the padding."""
    torch.manual_seed(seed)
    total = sum(lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = PackedBatch(
        token_ids=torch.randint(1, 50, (total,)),
        position_ids=position,
        cu_seqlens=cu,
        loss_mask=(torch.rand(total) < 0.6) & (position > 0),
        advantages=torch.zeros(total),
        rollout_logprobs=torch.zeros(total),
        rollout_index=torch.arange(len(lengths)),
    )
    layout = Layout(context * tensor, tensor, 1, 1, 1, 1, context, tensor > 1)
    shares = [lay_out(batch, layout, rank, "cpu") for rank in range(context)]
    held = torch.cat([rows.source for rows in shares])
    assert sorted(held[held >= 0].tolist()) == list(range(total))
    assert (
        sorted(torch.cat([rows.index for rows in shares]).tolist())
        == batch.loss_mask.nonzero().flatten().tolist()
    )
    for rows in shares:
        assert len(rows.source) % tensor == 0
        assert int(rows.packed.cu_seqlens_q[-1]) == context * len(rows.source)
        real = rows.source >= 0
        assert torch.equal(rows.token_ids[0][real], batch.token_ids[rows.source[real]])
        assert torch.equal(rows.position_ids[0][real], position[rows.source[real]])
        # the hidden state of token t - 1 predicts token t
        assert torch.equal(rows.source[rows.hidden_rows], rows.index - 1)
        assert torch.equal(rows.labels, batch.token_ids[rows.index])
