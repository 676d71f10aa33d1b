"""Batches laid out over context ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_dist.learners.megatron.layout import Layout
from gspo_dist.learners.megatron.rows import lay_out
from gspo_dist.types import PackedBatch


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
