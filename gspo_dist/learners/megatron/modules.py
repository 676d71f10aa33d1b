"""The layers that megatron-core lacks without Transformer Engine, and a router that counts its choices.

Letters: t tokens of this context rank, cp context ranks, np and ng local query heads and groups, d head
dimension, N rows of this tensor rank, E experts.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm whose weight knows of sequence parallelism. 0.16.1 refuses torch's own norm under it.

    y = w * x / sqrt(mean(x^2) + eps), with the mean over the last dimension in fp32. Under sequence
    parallelism each tensor rank normalises its own rows, so the weight's gradient is a partial sum. The mark
    on the weight makes finalize_model_grads add them up.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's mark

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class PackedAttention(nn.Module):
    """Causal attention over packed sequences, with context parallelism by gathering keys and values.

    The local DotProductAttention of 0.16.1 knows neither packed sequences nor context parallelism.
    Transformer Engine's knows both and needs CUDA.

    Rank r of cp holds chunks r and 2 cp - 1 - r of each sequence, in the order that Transformer Engine and
    the rotary code use. Keys and values are gathered over the group and put back in order, so each rank's
    queries see all that came before them. The backward pass reduce-scatters.
    """

    def __init__(
        self, config: Any, pg_collection: Any, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.cp = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: Any,
        **unused: Any,
    ) -> Tensor:
        """query [t, np, d], key and value [t, ng, d] -> [t, np * d]. Lengths come from packed_seq_params.

        Sequences attend one by one: nothing sees through a border.
        """
        bounds = tuple(packed_seq_params.cu_seqlens_q_padded.tolist())
        if self.cp > 1:
            order = natural_order(bounds, self.cp)
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.cp_group)[order] for x in (key, value)
            )
        out = []
        for start, end in pairwise(bounds):
            mine = slice(start // self.cp, end // self.cp)
            mask = None
            if self.cp > 1:
                at = chunk_positions(end - start, self.cp, self.cp_group.rank())
                mask = torch.arange(end - start) <= at[:, None]
            q, k, v = (x.transpose(0, 1)[None] for x in (query[mine], key[start:end], value[start:end]))
            out.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=self.scale,
                    enable_gqa=True,
                )[0].transpose(0, 1)
            )
        return torch.cat(out).flatten(1)


def chunk_positions(length: int, cp: int, rank: int) -> Tensor:
    """[length / cp] int64: the positions in a sequence of `length` that context rank `rank` holds.

    Example: length 8 and cp 2. Rank 0 holds 0 1 6 7 and rank 1 holds 2 3 4 5, equal work under a causal mask.
    """
    part = length // (2 * cp)
    early, late = rank * part, (2 * cp - 1 - rank) * part
    return torch.cat([torch.arange(early, early + part), torch.arange(late, late + part)])


def local_rows(bounds: tuple[int, ...], cp: int, rank: int) -> Tensor:
    """[T / cp] int64: the rows of a padded packed batch that context rank `rank` holds.

    Example: bounds (0, 8, 12) and cp 2. Rank 0 holds 0 1 6 7 8 11 and rank 1 holds 2 3 4 5 9 10.
    """
    if cp == 1:
        return torch.arange(bounds[-1])
    return torch.cat([a + chunk_positions(b - a, cp, rank) for a, b in pairwise(bounds)])


# Every layer asks for the same order, in the forward and in the backward. 64 holds a pass of
# as many micro-batches.
@lru_cache(maxsize=64)
def natural_order(bounds: tuple[int, ...], cp: int) -> Tensor:
    """[T] int64: for each row of the padded packed batch, where it lies after a rank-by-rank gather.

    Example: bounds (0, 8) and cp 2. The gather gives rows 0 1 6 7 2 3 4 5, so row 2 lies at 4.
    """
    gathered = torch.cat([local_rows(bounds, cp, rank) for rank in range(cp)])
    return torch.argsort(gathered)


class CountingRouter(TopKRouter):
    """megatron-core's router, plus the load of each expert and a bias that works with softmax scores.

    0.16.1 applies its expert bias to sigmoid scores only, and the scores here are softmax. The bias moves the
    choice alone, never the gate's value.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        device = torch.cuda.current_device()
        self.load = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=device)
        """[E] tokens sent to each expert since `balance.start`.

        Counted once per token in training: not without gradient, not twice under recomputation, no padding.
        """
        self.aux_loss = torch.zeros((), device=device)
        """The Switch loss of this rank's tokens since `balance.start`, without its coefficient."""
        self.aux_share = 0.0
        """1 / tokens of the mini-batch over all data-parallel ranks. `balance.start` sets it."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().forward(input, padding_mask)
        # megatron's checkpoints run the first forward without gradient and the recomputed one with it.
        if torch.is_grad_enabled():
            with torch.no_grad():
                chosen = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
                self.load += chosen.sum(0)
                if self.enable_expert_bias:
                    self.local_tokens_per_expert += chosen.sum(0)
        return probs, routing_map

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Adds the Switch loss of this micro-batch, times its share of the mini-batch's
        tokens and the coefficient.

        0.16.1 scales by local tokens and leaves the division to a per-token normalisation. That is not used
        here, because denominators are global. Nothing is added unless aux_loss_coef is set.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        per_expert, _, total = get_tokens_per_expert_and_token_count(
            routing_map=routing_map,
            reduce_group=self.tp_cp_group,
            topk=self.topk,
            with_padding_mask=with_padding_mask,
        )
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=per_expert,
            total_num_tokens=total,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
        ) * (total * self.aux_share)
        self.aux_loss += loss.detach() / coefficient
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Does nothing: `forward` counts.

        0.16.1's own count broadcasts a [N] mask against [N, E] and fails.
        """

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [..., E] -> gate values [N, E], zero where not chosen, and the choice [N, E] bool."""
        if self.router_replay is not None:
            self.router_replay.show(logits.view(-1, self.config.num_moe_experts))
        if not self.enable_expert_bias:
            return super().routing(logits, padding_mask)
        logits = logits.view(-1, self.config.num_moe_experts)
        scores = logits.float().softmax(-1) + self.expert_bias
        if self.router_replay is None:
            ids = torch.topk(scores, self.topk, dim=1).indices
        else:
            ids = self.router_replay.get_replay_topk(
                scores, self.topk, None, None, lambda s, k, *a, **kw: torch.topk(s, k, dim=1)
            )[1]
        if self.config.moe_router_pre_softmax:
            gate = logits.softmax(-1, dtype=torch.float32).gather(1, ids)
        else:
            gate = logits.gather(1, ids).softmax(-1, dtype=torch.float32)
        probs = torch.zeros_like(logits).scatter(1, ids, gate.type_as(logits))
        return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
