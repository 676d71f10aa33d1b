"""Puts the engine's operators into an HF model that a learner trains: `make_exact`.

The model keeps its modules, parameters and names. Their forwards are replaced one by one, so that optimisers,
routing replay and exports see no difference:

    linear layers, router, head    the engine's product, with the usual gradient
    norms after a residual sum     the engine's, of the sum before it is rounded (bf16 only)
    attention                      the engine's rotary, and its attention over a KV cache
    experts                        the engine's fused kernel, with the engine's gate weights

New forwards are bound methods and keep what they need on their module, so a deep copy computes with its own
weights. What cannot be made equal is refused: `check_exact` for the model, `check_products` for the
processor, `config.consistency` for the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from gspo_dist.learners.attention import PackedLayout, packed_attention, refuse_other_parts
from gspo_dist.learners.exact import operators as engine
from gspo_dist.rollout.vllm.engine import prepare_process
from gspo_dist.rollout.vllm.invariant import use_batch_invariant_kernels

NAME = "gspo_exact"
"""The attention's name with transformers."""
FAMILIES = ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose operators were compared with the engine's, one by one."""
FEW_ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64)
"""Numbers of rows that a product is tried with: an engine decodes with any number of sequences."""
MANY_ROWS = 256
"""Rows that they are compared with: a learner's micro-batch."""


def make_exact(hf: PreTrainedModel) -> None:
    """Replaces the forwards of a model whose head is a `LogprobHead` already.

    Raises ValueError for a model or a processor that cannot be made exact.
    """
    check_exact(hf)
    dtype = next(hf.parameters()).dtype
    # As in an engine's process: what vLLM reads when it is imported, and the AMX tiles of its bf16 kernels.
    prepare_process("cpu", 0, "fp32" if dtype == torch.float32 else "bf16")
    use_batch_invariant_kernels()
    base = cast(Any, hf.base_model)
    check_products(hf, dtype)
    cache = rotary_cache(base.rotary_emb, hf.config.max_position_embeddings, dtype)
    for layer in base.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        _make_attention_exact(layer.self_attn, cache)
        if hasattr(layer.mlp, "gate"):
            _make_experts_exact(layer.mlp)
    if dtype != torch.float32:
        _make_norms_exact(base)
    head = hf.get_output_embeddings()
    head.forward = MethodType(_head, head)
    hf.set_attn_implementation(NAME)


def check_exact(hf: PreTrainedModel) -> None:
    """ValueError, with the reason and the way out, for an architecture that is not known to be equal."""
    name, way_out = type(hf).__name__, "set learner.consistency=off"
    config = hf.config
    if name not in FAMILIES:
        raise ValueError(f"learner.consistency=exact knows {', '.join(FAMILIES)}: got {name}; {way_out}")
    rope = getattr(cast(Any, hf.base_model).rotary_emb, "rope_type", "default")
    if rope != "default":
        raise ValueError(
            "learner.consistency=exact has the engine's plain rotary embedding only: got rope type "
            f"{rope!r}; {way_out}"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"learner.consistency=exact has the engine's SwiGLU only: got hidden_act {config.hidden_act!r}; "
            f"{way_out}"
        )


def check_products(hf: nn.Module, dtype: torch.dtype) -> None:
    """ValueError that names the first product of the model whose rows depend on how many there are.

    The engine decodes with as many rows as sequences run, and the learner computes thousands at once. Whether
    oneDNN gives both the same bits depends on the processor and on the sizes (at an inner dimension of 2,048
    it did not, in either precision), so each size is tried here, on random numbers.
    """
    sizes = {
        (m.out_features, m.in_features): name for name, m in hf.named_modules() if isinstance(m, nn.Linear)
    }
    config = cast(Any, hf).config
    sizes[config.vocab_size, config.hidden_size] = "the head"
    if getattr(config, "num_experts", 0):
        sizes[config.num_experts, config.hidden_size] = "the router"
    generator = torch.Generator().manual_seed(0)
    for (out, inner), name in sizes.items():
        x = torch.randn(MANY_ROWS, inner, generator=generator).to(dtype)
        weight = (torch.randn(out, inner, generator=generator) / inner**0.5).to(dtype)
        product = engine.packed_product(weight, None)
        many = product(x)
        for rows in FEW_ROWS:
            if not torch.equal(product(x[:rows].contiguous()), many[:rows]):
                raise ValueError(
                    "learner.consistency=exact needs products that round alike for any number of rows: "
                    f"{rows} rows times {name} [{out}, {inner}] in {dtype} differ from the same rows among "
                    f"{MANY_ROWS} on this processor; set learner.consistency=off"
                )


def rotary_cache(rotary: nn.Module, positions: int, dtype: torch.dtype) -> Tensor:
    """[positions, D] in `dtype`: cosines, then sines, as the engine computes them."""
    frequencies = cast(Tensor, rotary.inv_freq).float()
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return engine.linear(x, module.weight, module.bias)


def _head(head: Any, hidden: Tensor, token_ids: Tensor, others: Tensor | None = None) -> tuple[Tensor, ...]:
    """hidden [N, H], token_ids [N] -> log-probs and entropies [N] float32, and those of others [N, K].

    The engine's logits, then the tempered log-softmax of its sampler. The learner's own head keeps a running
    maximum and sum instead, which never holds the logits.
    """
    logits = engine.linear(hidden, head.weight, head.bias)
    table = (logits.float() / head.temperature).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(dim=-1)
    taken = table.gather(1, token_ids[:, None])[:, 0]
    return (taken, entropy) if others is None else (taken, entropy, table.gather(1, others.long()))


# --- attention ---


@dataclass
class _Rotary:
    """What the engine's rotary of one attention layer starts from."""

    cache: Tensor
    """[positions, D]: cosines, then sines."""
    query: Tensor | None = None
    """Queries of the pass under way, before they are rotated."""
    key: Tensor | None = None
    """Keys."""

    def keep_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.query = output.detach()

    def keep_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.key = output.detach()


def _make_attention_exact(attention: nn.Module, cache: Tensor) -> None:
    rotary = _Rotary(cache)
    cast(Any, attention).exact_rotary = rotary
    # The last module before rotary: a norm over each head where the family has one.
    for name, keep in (("q", rotary.keep_query), ("k", rotary.keep_key)):
        last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
        last.register_forward_hook(keep)


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedLayout | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` with the engine's values: its rotary, then its attention."""
    rotary = cast(_Rotary, cast(Any, module).exact_rotary)
    assert packed is not None
    assert scaling is not None
    assert rotary.query is not None
    assert rotary.key is not None
    refuse_other_parts(asked, packed)  # the reference, which does so too, does not run without gradients
    positions = packed.slots % packed.longest

    def turned(x: Tensor, before: Tensor) -> Tensor:
        flat = x[0].transpose(0, 1)  # [T, heads, D]
        return engine.rotated(flat, before.reshape(flat.shape), positions, rotary.cache)

    q, k, v = turned(query, rotary.query), turned(key, rotary.key), value[0].transpose(0, 1)
    rotary.query = rotary.key = None

    def reference() -> Tensor:
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, _ = packed_attention(module, q_, k_, v_, attention_mask, scaling, dropout, packed, **asked)
        return out[0]

    out = engine.attention(reference, q, k, v, packed.cu_seqlens.diff().int(), scaling)
    return out[None], None


# --- experts ---


@dataclass
class _Gate:
    """What the router of one layer tells its experts."""

    logits: Tensor | None = None
    """[T, E]."""
    renormalise: bool = True


def _make_experts_exact(block: nn.Module) -> None:
    gate, experts = cast(Any, block).gate, cast(Any, block).experts
    gate.exact_gate = experts.exact_gate = _Gate(renormalise=gate.norm_topk_prob)
    gate.forward, experts.forward = MethodType(_choose, gate), MethodType(_apply, experts)


def _choose(gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, E], gate weights [T, K], ids [T, K]): the engine's choice, weighed by the
    router's own formula.

    The order of the ids is the engine's too, since its sums follow it.
    """
    logits = engine.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
    gate.exact_gate.logits = logits.detach()
    _, ids = engine.choose_experts(logits.detach(), gate.top_k, gate.norm_topk_prob)
    weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
    if gate.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights.to(logits.dtype), ids


def _apply(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[T, H]. Routing replay may have changed ids and weights on the way: the engine's weights are
    of these ids.
    """
    gate = experts.exact_gate
    exact = engine.weights_at(gate.logits, ids, gate.renormalise)
    gate.logits = None
    return engine.experts(
        lambda: type(experts).forward(experts, x, ids, weights),
        x,
        experts.gate_up_proj,
        experts.down_proj,
        exact,
        ids,
    )


# --- norms ---


@dataclass
class _Residual:
    """The last sum of the residual stream, in its two parts: what the next norm reads."""

    branch: Tensor | None = None
    """[1, T, H]: what attention or the experts gave."""
    stream: Tensor | None = None
    """[1, T, H]: what it is added to."""

    def after_attention(self, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        self.branch = output[0].detach()

    def after_mlp(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.branch = output.detach()

    def after_norm(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        # What a norm reads is what the next branch is added to.
        self.stream = args[0].detach()


def _make_norms_exact(base: Any) -> None:
    state = _Residual()
    layers = list(base.layers)
    for layer in layers:
        layer.self_attn.register_forward_hook(state.after_attention)
        layer.mlp.register_forward_hook(state.after_mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(state.after_norm)
    # The first norm reads the embedding, which is no sum.
    norms = [layers[0].post_attention_layernorm, base.norm]
    for layer in layers[1:]:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.exact_residual = state
        norm.forward = MethodType(_norm, norm)


def _norm(norm: Any, x: Tensor) -> Tensor:
    state = norm.exact_residual
    return engine.norm_of_sum(
        lambda: type(norm).forward(norm, x), state.branch, state.stream, norm.weight, norm.variance_epsilon
    )


AttentionInterface.register(NAME, exact_attention)
# No mask is ever built: the layout alone says who sees whom.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
