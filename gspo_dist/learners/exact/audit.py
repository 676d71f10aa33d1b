"""Where engine and learner part: both run one sequence, and what each operator gave is compared in order.

The outputs are caught by forward hooks. On the engine's side they are vLLM's modules, in the process of the
engine. On the learner's side they are transformers'. A product that the engine computes at once (queries,
keys and values, or gate and up) is put together from the learner's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gspo_dist.learners.exact.install import feed_forward

Caught = dict[str, Tensor]
"""Name of an operator -> what it gave, [tokens, ...], in the order of the forward."""


@dataclass(frozen=True)
class Difference:
    """The first operator whose outputs are not the same bits."""

    operator: str
    """Its name, with the layer: "layer 2 attention"."""
    token: int
    """Place in the sequence of the first token that differs."""
    values: int
    """How many of the operator's outputs differ."""
    largest: float
    """Largest |difference|."""

    def __str__(self) -> str:
        return (
            f"{self.operator}: {self.values} outputs differ, first of token {self.token}, by up to "
            f"{self.largest:.3g}"
        )


def first_difference(engine: Caught, learner: Caught) -> Difference | None:
    """The first operator of both whose outputs differ. None where every bit agrees.

    ValueError: they have no operator in common, or one gave them different shapes.
    """
    common = [name for name in learner if name in engine]
    if not common:
        raise ValueError(f"no operator was caught on both sides: got {[*engine][:4]} and {[*learner][:4]}")
    for name in common:
        ours, theirs = learner[name].float(), engine[name].float()
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name} has shapes of its own: engine {tuple(theirs.shape)}, learner {tuple(ours.shape)}"
            )
        differs = ours != theirs
        if differs.any():
            rows = differs.reshape(len(differs), -1).any(dim=1)
            largest = float((ours - theirs).abs().max())
            return Difference(name, int(rows.nonzero()[0]), int(differs.sum()), largest)
    return None


def catching_engine(model: nn.Module) -> AbstractContextManager[Caught]:
    """Catches what the operators of a vLLM model give inside the block, where one prefill is expected."""
    return _catching_layers(cast(Any, model).model, ("qkv_proj",))


def catching_learner(hf: nn.Module) -> AbstractContextManager[Caught]:
    """The same of a transformers model under the same names."""
    return _catching_layers(cast(Any, hf).base_model, ("q_proj", "k_proj", "v_proj"))


@contextmanager
def _catching_layers(base: Any, projections: Sequence[str]) -> Iterator[Caught]:
    """projections: the modules that make queries, keys and values. What several give is joined in order."""
    with _catching() as (caught, after, before):
        after(base.embed_tokens, "embedding")
        for i, layer in enumerate(base.layers):
            attention = layer.self_attn
            block = feed_forward(layer)
            # Granite's own router gives its ids first and is left out.
            router = getattr(block, "gate", None)
            after(layer.input_layernorm, f"layer {i} input norm")
            for name in ("qkv_proj",) if hasattr(attention, "qkv_proj") else projections:
                after(getattr(attention, name), f"layer {i} queries, keys, values")
            before(attention.o_proj, f"layer {i} attention")
            after(attention.o_proj, f"layer {i} attention output")
            after(layer.post_attention_layernorm, f"layer {i} post-attention norm")
            if router is not None:
                after(router, f"layer {i} router")
            after(block, f"layer {i} {'experts' if hasattr(block, 'experts') else 'mlp'}")
        after(base.norm, "last norm")
        yield caught


Catch = Callable[[nn.Module, str], None]


@contextmanager
def _catching() -> Iterator[tuple[Caught, Catch, Catch]]:
    """(what is caught, catch a module's output, catch its input). The hooks are gone after the block."""
    caught: Caught = {}

    def keep(name: str, value: Any) -> None:
        # Norms after a sum and products with a bias give more than their output; it comes first.
        tensor = value[0] if isinstance(value, tuple) else value
        rows = tensor.detach().reshape(-1, tensor.shape[-1]).clone()  # vLLM goes on in place
        caught[name] = torch.cat([caught[name], rows], dim=1) if name in caught else rows

    with ExitStack() as stack:

        def after(module: nn.Module, name: str) -> None:
            handle = module.register_forward_hook(lambda module, args, output: keep(name, output))
            stack.callback(handle.remove)

        def before(module: nn.Module, name: str) -> None:
            handle = module.register_forward_pre_hook(lambda module, args: keep(name, args[0]))
            stack.callback(handle.remove)

        yield caught, after, before
