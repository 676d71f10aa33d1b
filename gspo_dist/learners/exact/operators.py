"""vLLM's CPU operators as functions whose gradient is that of the learner's own operators.

Every function gives the bits that vLLM 0.30's CPU build gives for the same inputs. Its backward is the
gradient of the reference operator (torch, transformers) at those inputs: the engine's kernels have none.

What differs between the two without this module, on the trained quickstart model in bf16 (mean nats, one put
back at a time): rotary 1.8e-2 (vLLM fuses multiply and add), the norm after a residual sum 6.8e-3 (vLLM
normalises the sum before it is rounded), experts 4.9e-3 and attention 4.5e-3 (order of sums), gate weights up
to 1e-3 (softmax over the chosen logits instead of over all). Plain norms and embeddings are equal already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gspo_dist.rollout.vllm.invariant import packed_product

BLOCK = 32
"""Tokens of a KV block: the engine's (`rollout.vllm.engine.CPU_BLOCK`), which its attention kernel
is built for.
"""


class _Valued(torch.autograd.Function):
    """The second tensor's value with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, reference: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def valued(reference: Callable[[], Tensor], engine: Callable[[], Tensor]) -> Tensor:
    """What `engine` computes, differentiated as what `reference` computes. Without gradients only
    the first runs.
    """
    with torch.no_grad():
        value = engine()
    if not torch.is_grad_enabled():
        return value
    return cast(Tensor, _Valued.apply(reference(), value))


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., K], weight [N, K], bias [N] or None) -> [..., N]"""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The engine's on a CPU.

    The weight is packed anew at each call. A kept pack would have to be dropped at every optimiser step, and
    packing costs little beside a product of some thousand rows.
    """
    return packed_product(weight, bias)(x.contiguous())


class _Linear(torch.autograd.Function):
    """x [..., K] times weight [N, K] transposed, plus bias [N], by the engine's product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        return product(x.detach(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.with_bias and ctx.needs_input_grad[2] else None,
            None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, product: Product = product) -> Tensor:
    """`F.linear` with the engine's value."""
    return cast(Tensor, _Linear.apply(x, weight, bias, product))


def norm_of_sum(branch: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of branch + stream [.., H] as the engine computes it on a CPU.

    vLLM adds in float32 and normalises the sum as it is, where transformers rounds it first. In float32
    nothing is rounded and both are one.
    """
    total = branch.float() + stream.float()
    scale = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return ((total * scale).to(weight.dtype) * weight).to(branch.dtype)


def rotated(
    reference: Tensor, before: Tensor, positions: Tensor, cache: Tensor, *, neighbours: bool = False
) -> Tensor:
    """[T, heads, D]: `before` rotated by the engine, with the gradient of `reference`, which HF rotated.

    positions: [T] int64. cache: [positions, channels that turn], cosines and then sines. neighbours: pairs
    are neighbouring channels.
    """
    from vllm import _custom_ops as ops

    def engine() -> Tensor:
        # The kernel works in place, and on queries and keys of one token side by side.
        turned = before.reshape(len(positions), -1).clone()
        ops.rotary_embedding(positions, turned, None, before.shape[-1], cache, not neighbours)
        return turned.view_as(reference)

    return valued(lambda: reference, engine)


@dataclass(frozen=True)
class Pages:
    """Where the tokens of packed sequences lie in a paged KV cache of the batch's own."""

    count: int
    """Blocks, one run of them per sequence."""
    table: Tensor
    """[S, most blocks] int32: block ids of each sequence."""
    borders: Tensor
    """[S + 1] int32: tokens of each sequence."""
    slots: Tensor
    """[T] int64: block id times the block's size, plus the place in it."""

    @staticmethod
    def of(lengths: Tensor, block: int) -> Pages:
        """lengths: [S] int32. block: tokens of a block."""
        blocks = (lengths.long() + block - 1) // block
        first = blocks.cumsum(0) - blocks
        column = torch.arange(int(blocks.max()), device=lengths.device)
        table = torch.where(column < blocks[:, None], first[:, None] + column, 0).int()
        borders = F.pad(lengths.cumsum(0), (1, 0)).int()
        tokens = torch.arange(int(lengths.sum()), device=lengths.device)
        place = tokens - borders[:-1].long().repeat_interleave(lengths.long())
        slots = place + (first * block).repeat_interleave(lengths.long())
        return Pages(int(blocks.sum()), table, borders, slots)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """The engine's causal attention on a CPU, as a prefill. Returns [T, heads, D].

    q: [T, heads, D]. k, v: [T, kv_heads, D]. lengths: [S] int32, of the packed sequences.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    isa = _get_attn_isa(q.dtype, BLOCK, dim)
    pages = Pages.of(lengths, BLOCK)
    cache = q.new_zeros(pages.count, kv_heads, BLOCK * 2, dim)
    keys, values = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, pages.slots, isa)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lengths,
        dtype=q.dtype,
        query_start_loc=pages.borders,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=False,  # as in an invariant engine (rollout.vllm.invariant)
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    ops.cpu_attention_with_kv_cache(
        query=q.contiguous(),
        key_cache=keys,
        value_cache=values,
        output=out,
        query_start_loc=pages.borders,
        seq_lens=lengths,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=pages.table,
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
    )
    return out


def choose_experts(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (weights [T, K] float32, ids [T, K] int64) in the engine's order, which
    its sums follow.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _softmax_topk

    weights, ids = _softmax_topk(logits, top_k, renormalise)
    return weights, ids.long()


def weights_at(logits: Tensor, ids: Tensor, renormalise: bool) -> Tensor:
    """The engine's gate weights [T, K] float32 of given experts."""
    chosen = logits.gather(1, ids)
    if renormalise:
        return torch.softmax(chosen, dim=-1).float()
    return (chosen - torch.logsumexp(logits, dim=-1, keepdim=True)).exp().float()


def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The engine's on a CPU (SwiGLU): x [T, H], gate_up [E, 2I, H], down [E, H, I], weights [T, K] float32,
    ids [T, K] -> [T, H].
    """
    from vllm import _custom_ops as ops

    isa = "amx" if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ops.cpu_fused_moe(
        out,
        x.contiguous(),
        ops.cpu_prepack_moe_weight(gate_up.contiguous(), isa),
        ops.cpu_prepack_moe_weight(down.contiguous(), isa),
        None,
        None,
        weights.float().contiguous(),
        ids.int().contiguous(),
        "silu",
        isa,
    )
    return out
