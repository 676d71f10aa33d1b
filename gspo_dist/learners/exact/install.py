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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from gspo_dist.config.consistency import REFUSED_FAMILIES
from gspo_dist.learners.attention import PackedLayout, packed_attention, refuse_other_parts
from gspo_dist.learners.exact import operators as engine
from gspo_dist.learners.exact.families import FAMILIES, Family, Router
from gspo_dist.rollout.vllm.engine import prepare_process
from gspo_dist.rollout.vllm.invariant import use_batch_invariant_kernels

NAME = "gspo_exact"
"""The attention's name with transformers."""
ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding. The engine's own table of cosines is used, and only the default kind was counted
against an engine so far.
"""
FEW_ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64)
"""Numbers of rows that a product is tried with: an engine decodes with any number of sequences."""
MANY_ROWS = 256
"""Rows that they are compared with: a learner's micro-batch."""


def make_exact(hf: PreTrainedModel) -> None:
    """Replaces the forwards of a model whose head is a `LogprobHead` already.

    Raises ValueError for a model or a processor that cannot be made exact.
    """
    family = check_exact(hf)
    dtype = next(hf.parameters()).dtype
    # As in an engine's process: what vLLM reads when it is imported, and the AMX tiles of its bf16 kernels.
    prepare_process("cpu", 0, "fp32" if dtype == torch.float32 else "bf16")
    use_batch_invariant_kernels()
    base = cast(Any, hf.base_model)
    check_products(hf, family, dtype)
    cache = rotary_cache(hf, family, dtype)
    for layer in base.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        make_attention_exact(layer.self_attn, cache, family)
    for experts, gate in routers(hf):
        make_experts_exact(gate, experts, family.router(gate))
    if dtype != torch.float32 and family.sums_in_norms:
        make_norms_exact(base)
    make_head_exact(hf)
    hf.set_attn_implementation(NAME)


def check_exact(hf: PreTrainedModel) -> Family:
    """ValueError, with the reason and the way out, for an architecture that is not known to be equal."""
    name, config = type(hf).__name__, cast(Any, hf.config)

    def refuse(reason: str) -> ValueError:
        return ValueError(f"learner.consistency=exact {reason}; set learner.consistency=off")

    if name in REFUSED_FAMILIES:
        raise refuse(f"does not make {name} equal, which has {REFUSED_FAMILIES[name]}")
    if name not in FAMILIES:
        raise refuse(f"knows {', '.join(FAMILIES)}: got {name}")
    family = FAMILIES[name]
    rope = getattr(cast(Any, hf.base_model).rotary_emb, "rope_type", "default")
    if rope not in ROPES:
        raise refuse(f"has the engine's rotary embeddings {', '.join(ROPES)} only: got rope type {rope!r}")
    if config.hidden_act != family.activation:
        raise refuse(
            f"has the engine's {family.activation} in {name} only: got hidden_act {config.hidden_act!r}"
        )
    if getattr(hf.get_output_embeddings(), "logit_softcap", None) is not None:
        raise refuse("has no soft cap of the logits")
    if getattr(config, "clip_qkv", None) is not None:
        raise refuse(f"has no clipped queries: got clip_qkv {config.clip_qkv}, which vLLM leaves out")
    return family


def feed_forward(layer: Any) -> Any:
    """The part of a layer that is experts or an MLP, under the name of its family."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def router_of(block: Any) -> Any:
    """The router of a block with experts, under the name of its family."""
    return block.router if hasattr(block, "router") else block.gate


def check_products(hf: PreTrainedModel, family: Family, dtype: torch.dtype) -> None:
    """ValueError that names the first product of the model whose rows depend on how many there are.

    The engine decodes with as many rows as sequences run, and the learner computes thousands at once. Whether
    oneDNN gives both the same bits depends on the processor and on the sizes (at an inner dimension of 2,048
    it did not, in either precision), so each size is tried here, on random numbers.
    """
    # Sizes by the modules and the config, since ZeRO 3 holds parts of the weights.
    sizes: dict[tuple[int, int], tuple[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]] = {}
    for name, module in hf.named_modules():
        if isinstance(module, nn.Linear):
            sizes[module.out_features, module.in_features] = name, _packed
    config = cast(Any, hf.config)
    sizes[config.vocab_size, config.hidden_size] = "the head", _packed
    for _, gate in routers(hf):
        sizes[gate.num_experts, config.hidden_size] = "the router", family.router(gate).product
    generator = torch.Generator().manual_seed(0)
    for (out, inner), (name, make) in sizes.items():
        x = torch.randn(MANY_ROWS, inner, generator=generator).to(dtype)
        weight = (torch.randn(out, inner, generator=generator) / inner**0.5).to(dtype)
        product = make(weight)
        many = product(x)
        for rows in FEW_ROWS:
            if not torch.equal(product(x[:rows].contiguous()), many[:rows]):
                raise ValueError(
                    "learner.consistency=exact needs products that round alike for any number of rows: "
                    f"{rows} rows times {name} [{out}, {inner}] in {dtype} differ from the same rows among "
                    f"{MANY_ROWS} on this processor; set learner.consistency=off"
                )


def _packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return engine.packed_product(weight, None)


def rotary_cache(hf: PreTrainedModel, family: Family, dtype: torch.dtype) -> Tensor:
    """[positions, channels that turn] in `dtype`: cosines, then sines, as the engine computes them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    config = cast(Any, hf.config)
    attention = cast(Any, hf.base_model).layers[0].self_attn
    made = dict(rotary_embedding._ROPE_DICT)
    with set_current_vllm_config(VllmConfig()):
        rope = rotary_embedding.get_rope(
            attention.head_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=not family.neighbours,
            rope_parameters=config.rope_parameters,
            dtype=dtype,
        )
    # vLLM keeps what it makes. An engine of this process would take the module over and compute with torch's
    # operators, since no configuration of an engine was there when it was made.
    rotary_embedding._ROPE_DICT.clear()
    rotary_embedding._ROPE_DICT.update(made)
    return cast(Tensor, rope.cos_sin_cache).clone()


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return engine.linear(x, module.weight, module.bias)


def make_head_exact(hf: PreTrainedModel, product: engine.Product = engine.product) -> None:
    head = hf.get_output_embeddings()
    head.exact_product = product
    head.forward = MethodType(_head, head)


def _head(head: Any, hidden: Tensor, token_ids: Tensor, others: Tensor | None = None) -> tuple[Tensor, ...]:
    """hidden [N, H], token_ids [N] -> log-probs and entropies [N] float32, and those of others [N, K].

    The engine's logits, then the tempered log-softmax of its sampler. The learner's own head keeps a running
    maximum and sum instead, which never holds the logits.
    """
    logits = engine.linear(hidden, head.weight, head.bias, product=head.exact_product)
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale  # in the logits' own precision, as the engine does
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
    """[positions, channels that turn]: cosines, then sines."""
    neighbours: bool
    """Whether pairs are neighbouring channels."""
    queries: int
    """Channels of all queries, where one product gives queries, keys and values."""
    keys: int
    """Channels of all keys."""
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    """The engine's attention: see `operators.attention`."""
    query: Tensor | None = None
    """Queries of the pass under way, before they are rotated."""
    key: Tensor | None = None
    """Keys."""

    def keep_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.query = output.detach()

    def keep_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.key = output.detach()

    def keep_both(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.query, self.key, _ = output.detach().split(
            [self.queries, self.keys, output.shape[-1] - self.queries - self.keys], dim=-1
        )


def make_attention_exact(
    attention: Any,
    cache: Tensor,
    family: Family,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = engine.attention,
) -> None:
    keys = attention.config.num_key_value_heads * attention.head_dim
    rotary = _Rotary(cache, family.neighbours, keys * attention.num_key_value_groups, keys, attend)
    attention.exact_rotary = rotary
    if hasattr(attention, "qkv_proj"):
        attention.qkv_proj.register_forward_hook(rotary.keep_both)
        return
    # The last module before rotary: a norm where the family has one.
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
    rotary.cache = rotary.cache.to(query.device)  # it is made on the host

    def turned(x: Tensor, before: Tensor) -> Tensor:
        flat = x[0].transpose(0, 1)  # [T, heads, D]
        return engine.rotated(
            flat, before.reshape(flat.shape), positions, rotary.cache, neighbours=rotary.neighbours
        )

    q, k, v = turned(query, rotary.query), turned(key, rotary.key), value[0].transpose(0, 1)
    rotary.query = rotary.key = None

    def reference() -> Tensor:
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, _ = packed_attention(module, q_, k_, v_, attention_mask, scaling, dropout, packed, **asked)
        return out[0]

    lengths = packed.cu_seqlens.diff().int()
    return engine.valued(reference, lambda: rotary.attend(q, k, v, lengths, scaling))[None], None


# --- experts ---


@dataclass
class _Gate:
    """What the router of one layer tells its experts."""

    router: Router
    """The family's rules."""
    compute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """The engine's experts: see `operators.experts`."""
    logits: Tensor | None = None
    """[T, E]."""


def routers(hf: nn.Module) -> Iterator[tuple[Any, Any]]:
    """(experts, router) of every layer that has them."""
    for layer in cast(Any, hf).base_model.layers:
        block = feed_forward(layer)
        if hasattr(block, "experts"):
            yield block.experts, router_of(block)


def make_experts_exact(
    gate: Any,
    experts: Any,
    router: Router,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = engine.experts,
) -> None:
    gate.exact_gate = experts.exact_gate = _Gate(router, compute)
    gate.forward, experts.forward = MethodType(_choose, gate), MethodType(_apply, experts)


def _choose(gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], gate weights [T, K] and ids [T, K] in the family's order: the engine's choice,
    weighed by the router's own formula.

    The order of the ids is the engine's too, since its sums follow it.
    """
    router = gate.exact_gate.router
    logits = router.logits(gate, hidden.reshape(-1, hidden.shape[-1]))
    gate.exact_gate.logits = logits.detach()
    ids = router.choose(logits.detach())
    return router.outputs(logits, router.weights(logits, ids), ids)


def _apply(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[T, H]. Routing replay may have changed ids and weights on the way: the engine's weights are
    of these ids.
    """
    gate = experts.exact_gate
    exact = gate.router.engine_weights(gate.logits, ids)
    gate.logits = None
    return engine.valued(
        lambda: type(experts).forward(experts, x, ids, weights),
        lambda: gate.compute(x, experts.gate_up_proj, experts.down_proj, exact, ids),
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


def make_norms_exact(base: Any, norm_of_sum: Callable[..., Tensor] = engine.norm_of_sum) -> None:
    """Those after a sum. norm_of_sum: as `operators.norm_of_sum`."""
    state = _Residual()
    layers = list(base.layers)
    for layer in layers:
        layer.self_attn.register_forward_hook(state.after_attention)
        feed_forward(layer).register_forward_hook(state.after_mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(state.after_norm)
    # The first norm reads the embedding, which is no sum.
    norms = [layers[0].post_attention_layernorm, base.norm]
    for layer in layers[1:]:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.exact_residual, norm.exact_value = state, norm_of_sum
        norm.forward = MethodType(_norm, norm)


def _norm(norm: Any, x: Tensor) -> Tensor:
    state = norm.exact_residual
    return engine.valued(
        lambda: type(norm).forward(norm, x),
        lambda: norm.exact_value(state.branch, state.stream, norm.weight, norm.variance_epsilon),
    )


AttentionInterface.register(NAME, exact_attention)
# No mask is ever built: the layout alone says who sees whom.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
