"""The same for GPUs, by reading vLLM 0.30: its batch-invariant CUDA operators in an HF model.

An H100 gave the same number for every token (benchmarks/reports/gpu/h100.md). With VLLM_BATCH_INVARIANT=1 the
engine computes products, plain norms, attention, experts and log-softmax with Triton kernels whose sums have
one order for any number of rows, and the rest with CUDA kernels that work row by row. `make_exact` gives the
learner those kernels, each with the gradient of transformers' operator at the same inputs, as `operators`
does on a CPU. Besides what differs there, on a GPU differ

    products                       by the sizes of the weight: queries, keys and values are one product of the
                                   engine's, and gate and up are, whose blocks may be others than the parts'
    plain norms, q/k norms         the weight is multiplied before the result is rounded
    SwiGLU                         one kernel
    the choice of experts          one kernel with the softmax

Whether that is all on another card, `benchmarks/gpu_check.py --only exact families` tells in minutes. A run
needs `learner.exact_on_gpu=true` and stops at the first token that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gspo_dist.learners.exact import install
from gspo_dist.learners.exact import operators as exact
from gspo_dist.learners.exact.families import Router
from gspo_dist.rollout.vllm.engine import GPU_BLOCK, prepare_process

FAMILIES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
"""Architectures that vLLM computes on a GPU with the operators below alone."""


def make_exact(hf: PreTrainedModel) -> None:
    """Replaces the forwards of a model whose head is a `LogprobHead` already.

    ValueError for an architecture that was not read.
    """
    family, name = install.check_exact(hf), type(hf).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"learner.consistency=exact on a GPU knows {', '.join(sorted(FAMILIES))}: got {name}; set "
            "learner.consistency=off"
        )
    dtype = next(hf.parameters()).dtype
    prepare_process("cuda", 0, "fp32" if dtype == torch.float32 else "bf16", batch_invariant=True)
    use_invariant_kernels()
    base = cast(Any, hf.base_model)
    cache = install.rotary_cache(hf, family, dtype)
    for layer in base.layers:
        attention, block = layer.self_attn, layer.mlp
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        join([attention.q_proj, attention.k_proj, attention.v_proj])
        if not hasattr(block, "experts"):
            join([block.gate_proj, block.up_proj])
            block.forward = MethodType(_feed_forward, block)
        for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
            if norm is not None:
                norm.forward = MethodType(_norm, norm)
        install.make_attention_exact(attention, cache, family, attend)
    for moe, gate in install.routers(hf):
        install.make_experts_exact(gate, moe, FusedRouter(gate, family.router(gate)), experts)
    base.layers[0].input_layernorm.forward = MethodType(_norm, base.layers[0].input_layernorm)
    install.make_norms_exact(base, norm_of_sum)
    install.make_head_exact(hf, product)
    hf.set_attn_implementation(install.NAME)


def use_invariant_kernels() -> None:
    """What an engine's worker does at its start: sizes of blocks by the card, and softmax, log-softmax and
    mean of this whole process.
    """
    from vllm.model_executor.determinism.batch_invariant import init_batch_invariance

    init_batch_invariance()


# --- products ---


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant

    return cast(Tensor, linear_batch_invariant(x.contiguous(), weight, bias))


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return exact.linear(x, module.weight, module.bias, product=product)


@dataclass
class _Joined:
    """Linear layers over one input that are one product of the engine's."""

    parts: list[nn.Linear]
    """In the engine's order."""
    x: Tensor | None = None
    """The input of the pass under way."""
    outputs: tuple[Tensor, ...] = ()
    """What it gives, part by part."""

    def __call__(self, part: nn.Linear, x: Tensor) -> Tensor:
        """The part's share of the product, with its own gradient."""
        if self.x is not x:
            with torch.no_grad():
                weights: list[Tensor] = [p.weight for p in self.parts]
                biases: list[Tensor] = [p.bias for p in self.parts if p.bias is not None]
                whole = product(x, torch.cat(weights), torch.cat(biases) if biases else None)
            self.x, self.outputs = x, whole.split([p.out_features for p in self.parts], dim=-1)
        place = next(i for i, p in enumerate(self.parts) if p is part)
        value = self.outputs[place].contiguous()
        if place == len(self.parts) - 1:
            self.x, self.outputs = None, ()
        return exact.linear(x, part.weight, part.bias, product=lambda *_: value)


def join(parts: Sequence[nn.Linear]) -> None:
    """Makes linear layers that are called in this order, on the same input, parts of one product."""
    joined = _Joined(list(parts))
    for part in parts:
        cast(Any, part).exact_joined = joined
        part.forward = MethodType(_part, part)  # type: ignore[method-assign]


def _part(module: Any, x: Tensor) -> Tensor:
    return cast(Tensor, module.exact_joined(module, x))


# --- norms and SwiGLU ---


def _norm(norm: Any, x: Tensor) -> Tensor:
    """A norm that reads no sum: queries, keys, the embedding."""
    from vllm.model_executor.determinism.batch_invariant import rms_norm_batch_invariant

    return exact.valued(
        lambda: type(norm).forward(norm, x),
        lambda: rms_norm_batch_invariant(x, norm.weight, norm.variance_epsilon),
    )


def norm_of_sum(branch: Tensor, stream: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from vllm import _custom_ops as ops

    out, total = branch.contiguous().clone(), stream.contiguous().clone()
    ops.fused_add_rms_norm(out, total, weight, epsilon)  # in place: the norm, and the sum
    return out


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)

    def value() -> Tensor:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        torch.ops._C.silu_and_mul(out, torch.cat([gate, up], dim=-1))
        return out

    return cast(Tensor, mlp.down_proj(exact.valued(lambda: mlp.act_fn(gate) * up, value)))


# --- attention ---


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As `operators.attention`: vLLM's Triton attention (TRITON_ATTN), in one pass over the history."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    pages = exact.Pages.of(lengths, GPU_BLOCK)
    keys, values = (x.new_zeros(pages.count, GPU_BLOCK, *x.shape[1:]) for x in (k, v))
    keys.flatten(0, 1)[pages.slots] = k
    values.flatten(0, 1)[pages.slots] = v
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    longest = int(lengths.max())
    unified_attention(
        q=q.contiguous(),
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=pages.borders,
        max_seqlen_q=longest,
        seqused_k=lengths,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1),
        block_table=pages.table,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    return out


# --- experts ---


class FusedRouter(Router):
    """The engine's kernel chooses and weighs at once. What is differentiated is the family's formula."""

    def __init__(self, gate: Any, family: Router) -> None:
        super().__init__(gate)
        self.family = family

    def logits(self, gate: Any, hidden: Tensor) -> Tensor:
        return exact.linear(hidden, gate.weight, product=product)

    def choose(self, logits: Tensor) -> Tensor:
        return self._fused(logits)[1]

    def engine_weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The kernel's, where it would choose these experts. Replayed ones that it would not choose are
        weighed by the formula: no engine has weighed them.
        """
        weights, native = self._fused(logits)
        table = torch.full_like(logits, torch.nan, dtype=torch.float32).scatter_(1, native, weights)
        found = table.gather(1, ids)
        same = ~found.isnan().any(dim=1, keepdim=True)
        return torch.where(same, found, self.weights(logits.float(), ids).float())

    def _fused(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

        weights, ids, _ = fused_topk(logits, logits, self.top_k, self.renormalises)
        return weights, ids.long()

    def weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        return self.family.weights(logits, ids)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As `operators.experts`: vLLM's Triton kernels with the one size of blocks of batch-invariant mode."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return fused_experts(x.contiguous(), gate_up, down, weights.float().contiguous(), ids.int().contiguous())
