"""Log-probs of a few given tokens beside the taken one, without another pass over the vocabulary.

    x = logit_scale (hidden @ weight.T + bias) / temperature, capped as the head caps it
    logprob[i, v] = x[i, v] - lse_i = logprob[i, y_i] + x[i, v] - x[i, y_i]

The taken token's log-prob is at hand with its gradient, and lse_i with it. So K tokens cost their own rows of
`weight` and nothing of the size of the vocabulary: flops 2N(K + 1)H forward and twice that backward.
Where ranks share the vocabulary, each gives the products of its own rows and 0 for the others, which sum up.
Shapes: N tokens, H hidden size, V vocabulary (of this rank), K tokens beside the taken one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo_dist.learners.head.logprobs import VocabParallel
from gspo_dist.learners.head.passes import accumulator

GATHERED_BYTES = 64 << 20
"""Rows of `weight` that are gathered at once, in float32."""


def other_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    others: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """Log-probs [N, K] float32 in nats of the tokens `others`, with gradient.

    hidden [N, H], weight [V, H], bias [V]: as `taken_logprobs` takes them. token_ids [N], logprobs [N]: the
    taken tokens, and what it gave for them. others: [N, K], integers. vocab_parallel: as it was there; every
    rank gets the same log-probs, and the same gradient must come back on every rank.

    Worked example: logits [0, log 3], taken token 1 of log-prob log 3/4, others [[0, 1]]:
    [[log 1/4, log 3/4]].
    """
    ids = torch.cat([token_ids[:, None], others], dim=1).long()
    x = _RowProducts.apply(hidden, weight, bias, ids, vocab_parallel) * logit_scale
    if logit_softcap is not None:
        x = logit_softcap * torch.tanh(x / logit_softcap)
    x = x / temperature
    return logprobs[:, None] + (x[:, 1:] - x[:, :1])


class _RowProducts(torch.autograd.Function):
    """hidden [N, H], weight [V, H], bias [V], ids [N, M] -> hidden[i] . weight[ids[i, j]] + bias[ids[i, j]].

    The result is [N, M], float32 or wider. Gathers a block of tokens at a time, so that [N, M, H] is never
    held.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        parallel: VocabParallel | None,
    ) -> Tensor:
        elsewhere = None
        if parallel is not None:
            ids = ids - parallel.start
            elsewhere = (ids < 0) | (ids >= len(weight))
            ids = ids.masked_fill(elsewhere, 0)
        ctx.save_for_backward(hidden, weight, bias, ids, elsewhere)
        ctx.parallel = parallel
        dtype = accumulator(hidden.dtype)
        out = torch.zeros(ids.shape, dtype=dtype, device=ids.device)
        if len(weight):  # a rank's part of the vocabulary may be empty
            for rows in _blocks(hidden, ids):
                out[rows] = torch.einsum("nh,nmh->nm", hidden[rows].to(dtype), weight[ids[rows]].to(dtype))
            if bias is not None:
                out += bias[ids].to(dtype)
        if parallel is not None:
            assert elsewhere is not None
            out = out.masked_fill(elsewhere, 0.0)
            dist.all_reduce(out, group=parallel.group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, elsewhere = ctx.saved_tensors
        parallel: VocabParallel | None = ctx.parallel
        grad = grads[0] if elsewhere is None else grads[0].masked_fill(elsewhere, 0.0)
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        own = torch.zeros(hidden.shape, dtype=grad.dtype, device=grad.device) if need_hidden else None
        shared = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device) if need_weight else None
        offsets = None
        if need_bias:
            offsets = torch.zeros(bias.shape, dtype=grad.dtype, device=grad.device)
        for rows in _blocks(hidden, ids) if len(weight) else ():
            if own is not None:
                own[rows] = torch.einsum("nm,nmh->nh", grad[rows], weight[ids[rows]].to(grad.dtype))
            if shared is not None:
                outer = grad[rows][:, :, None] * hidden[rows].to(grad.dtype)[:, None, :]
                shared.index_add_(0, ids[rows].flatten(), outer.flatten(0, 1))
            if offsets is not None:
                offsets.index_add_(0, ids[rows].flatten(), grad[rows].flatten())
        if own is not None and parallel is not None and parallel.reduce_hidden_grad:
            dist.all_reduce(own, group=parallel.group)
        return (
            None if own is None else own.to(hidden.dtype),
            None if shared is None else shared.to(weight.dtype),
            None if offsets is None else offsets.to(bias.dtype),
            None,
            None,
        )


def _blocks(hidden: Tensor, ids: Tensor) -> Iterator[slice]:
    """Tokens whose gathered rows fit `GATHERED_BYTES`."""
    step = max(1, GATHERED_BYTES // (4 * ids.shape[1] * hidden.shape[1]))
    return (slice(start, start + step) for start in range(0, len(ids), step))
