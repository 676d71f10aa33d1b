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
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class _Linear(torch.autograd.Function):
    """x [..., K] times weight [N, K] transposed, plus bias [N], by the engine's product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        # The weight is packed anew at each call. A kept pack would have to be dropped at every optimiser
        # step, and packing costs little beside a product of some thousand rows.
        return packed_product(weight, bias)(x.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.with_bias and ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with the engine's value."""
    return cast(Tensor, _Linear.apply(x, weight, bias))


def packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b as vLLM's unquantised linear layers compute it here: they choose a kernel by size."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = cast(Any, nn.Module())
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return lambda x: cast(Tensor, layer.cpu_linear(x, layer.weight, layer.bias))


def norm_of_sum(
    reference: Callable[[], Tensor], branch: Tensor, stream: Tensor, weight: Tensor, epsilon: float
) -> Tensor:
    """RMS norm of branch + stream [.., H], where `reference` normalises the sum after it was rounded.

    vLLM adds in float32 and normalises the sum as it is. In float32 nothing is rounded and both are one.
    """

    def engine() -> Tensor:
        total = branch.float() + stream.float()
        scale = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + epsilon)
        return ((total * scale).to(weight.dtype) * weight).to(branch.dtype)

    return valued(reference, engine)


def rotated(reference: Tensor, before: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
    """[T, heads, D]: `before` rotated by the engine, with the gradient of `reference`, which HF rotated.

    positions [T] int64; cache [positions, D]: cosines, then sines.
    """
    from vllm import _custom_ops as ops

    def engine() -> Tensor:
        # The kernel works in place, and on queries and keys of one token side by side.
        turned = before.reshape(len(positions), -1).clone()
        ops.rotary_embedding(positions, turned, None, before.shape[-1], cache, True)
        return turned.view_as(reference)

    return valued(lambda: reference, engine)


def attention(
    reference: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """q [T, heads, D]; k, v [T, kv_heads, D]; lengths [S] int32 of the packed sequences -> [T,
    heads, D], causal.
    """
    return valued(reference, lambda: _engine_attention(q, k, v, lengths, scale))


def _engine_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Fills a KV cache of the batch's own, one run of blocks per sequence, and attends to it as a prefill."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    isa = _get_attn_isa(q.dtype, BLOCK, dim)
    blocks = (lengths.long() + BLOCK - 1) // BLOCK
    first = blocks.cumsum(0) - blocks
    column = torch.arange(int(blocks.max()))
    table = torch.where(column < blocks[:, None], first[:, None] + column, 0).int()
    borders = F.pad(lengths.cumsum(0), (1, 0)).int()
    place = torch.arange(tokens) - borders[:-1].long().repeat_interleave(lengths.long())
    slots = place + (first * BLOCK).repeat_interleave(lengths.long())
    cache = q.new_zeros(int(blocks.sum()), kv_heads, BLOCK * 2, dim)
    keys, values = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, slots, isa)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lengths,
        dtype=q.dtype,
        query_start_loc=borders,
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
        query_start_loc=borders,
        seq_lens=lengths,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
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


def experts(
    reference: Callable[[], Tensor],
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
) -> Tensor:
    """x [T, H], gate_up [E, 2I, H], down [E, H, I], weights [T, K] float32, ids [T, K] -> [T, H] (SwiGLU)."""
    from vllm import _custom_ops as ops

    def engine() -> Tensor:
        isa = "amx" if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        ops.cpu_fused_moe(
            out,
            x.contiguous(),
            ops.cpu_prepack_moe_weight(gate_up.detach().contiguous(), isa),
            ops.cpu_prepack_moe_weight(down.detach().contiguous(), isa),
            None,
            None,
            weights.float().contiguous(),
            ids.int().contiguous(),
            "silu",
            isa,
        )
        return out

    return valued(reference, engine)
