"""Lays a packed batch out for one context rank: its padded rows and where the trained tokens went.

Example: two context ranks, one sequence of 6 tokens of which 3 to 5 are trained. It is padded to 8 rows.
Rank 0 holds rows 0 1 6 7 and rank 1 holds rows 2 3 4 5. Token 3 is predicted from row 2 and token 5 from row
4, so all three trained tokens fall to rank 1: index [3, 4, 5], hidden_rows [0, 1, 2].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from gspo_dist.learners.loss import trained_index
from gspo_dist.learners.megatron.layout import Layout
from gspo_dist.learners.megatron.modules import local_rows
from gspo_dist.types import PackedBatch


@dataclass(frozen=True)
class Rows:
    """One context rank's share of a packed batch: t rows with N trained tokens."""

    token_ids: Tensor
    """[1, t], 0 in padding rows."""
    position_ids: Tensor
    """[1, t] places within the padded sequence."""
    packed: PackedSeqParams
    """Sequence bounds after padding, over all context ranks."""
    index: Tensor
    """[N] places of the trained tokens in the packed batch, on the CPU."""
    hidden_rows: Tensor
    """[N] the local rows whose hidden states predict them."""
    labels: Tensor
    """[N] their token ids."""
    source: Tensor
    """[t] the token of the packed batch in each local row, -1 for padding."""
    padded: bool
    """Whether any rank's rows hold padding."""

    def padding_mask(self, layout: Layout, tensor_rank: int, first_stage: bool) -> Tensor | None:
        """[1, t] bool, True = padding. None when no rank has any.

        All ranks get a mask or none, so that they count tokens in the same way. 0.16.1 cuts the mask for
        sequence parallelism on the first stage only. Other stages are given their part, [1, t / tensor].
        """
        if not self.padded:
            return None
        mask = (self.source < 0)[None]
        if first_stage or not layout.sequence_parallel:
            return mask
        return mask.chunk(layout.tensor, 1)[tensor_rank].contiguous()


@dataclass(frozen=True)
class MicroBatch:
    """A packed batch and this rank's share of it. It is what `routing.megatron` calls a MicroBatch."""

    batch: PackedBatch
    """The batch of the whole replica."""
    rows: Rows
    """This context rank's rows."""

    @property
    def source(self) -> Tensor:
        return self.rows.source


def lay_out(batch: PackedBatch, layout: Layout, context_rank: int, device: Any) -> Rows:
    """Pads each sequence to the layout's multiple and takes the rank's share.

    The batch is padded too, by one more sequence of padding, so that tensor ranks get equal rows.
    Example: context 2 and lengths 6 and 3 give padded lengths 8 and 4, so bounds [0, 8, 12] and
    6 rows per rank.
    """
    unit, cp = layout.sequence_multiple, layout.context
    lengths = batch.cu_seqlens.diff().tolist()
    padded = [-(-n // unit) * unit for n in lengths]
    spare = -sum(padded) % math.lcm(unit, cp * layout.token_multiple)
    bounds = torch.tensor([0, *padded, *([spare] if spare else [])]).cumsum(0)
    total = int(bounds[-1])
    row_of_token = bounds[:-1][batch.sequence_ids()] + batch.position_ids
    token_of_row = torch.full((total,), -1, dtype=torch.int64)
    token_of_row[row_of_token] = torch.arange(batch.num_tokens)
    within = torch.arange(total) - torch.repeat_interleave(bounds[:-1], bounds.diff())
    # `place` turns a row of the whole layout into a row of this rank, -1 for another rank's.
    rows = local_rows(tuple(bounds.tolist()), cp, context_rank)
    place = torch.full((total,), -1, dtype=torch.int64)
    place[rows] = torch.arange(len(rows))
    source = token_of_row[rows]
    index = trained_index(batch)
    # The hidden state of token t - 1 predicts token t; the first token of a sequence is never trained.
    hidden_rows = place[row_of_token[index - 1]]
    here = hidden_rows >= 0
    cu = bounds.to(device, torch.int32)
    longest = int(bounds.diff().max())
    return Rows(
        token_ids=torch.where(source >= 0, batch.token_ids[source.clamp(min=0)], 0)[None].to(device),
        position_ids=within[rows][None].to(device),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu,
            cu_seqlens_kv=cu,
            cu_seqlens_q_padded=cu,
            cu_seqlens_kv_padded=cu,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        index=index[here],
        hidden_rows=hidden_rows[here].to(device),
        labels=batch.token_ids[index[here]].to(device),
        source=source.to(device),
        padded=total > batch.num_tokens,
    )
