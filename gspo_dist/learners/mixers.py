"""Layers with memory over packed sequences: linear attention, Mamba, short convolutions.

Such a layer carries a state from token to token, so laid end to end a sequence would see the one before it.
Hooks around it spread the packed tokens [1, T, H] over a padded grid [S, longest, H] and collect them again.
Padding stands behind each sequence and every such layer is causal, so no token sees it: the result is exact,
whatever kernel the layer runs. Everything else of the model stays packed and is called once per micro-batch,
which sharded engines rely on. A model without such layers gets no hook.

Example: sequences of 2 and 3 tokens, [a b c d e], become the grid [[a b 0] [c d e]].
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gspo_dist.learners.attention import PackedLayout
from gspo_dist.models.layers import FULL, MEMORY
from gspo_dist.models.shape import ModelShape

# What a layer may be beside one with memory: full attention, or none of its own (Nemotron-H).
_PACKED = frozenset({FULL, "moe", "mlp"})


class SequenceMixers:
    """The hooks around one model's layers with memory, and the borders of the batch that it computes now."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = find_mixers(model)
        self._layout: PackedLayout | None = None
        for module in self.modules.values():
            module.register_forward_pre_hook(self._spread, with_kwargs=True)
            module.register_forward_hook(self._collect)

    def set_layout(self, layout: PackedLayout) -> None:
        """The borders of the next forward. They stay for its backward, which may run layers again."""
        self._layout = layout

    def _borders(self, module: nn.Module, tokens: int) -> PackedLayout:
        layout = self._layout
        if layout is None or len(layout.slots) != tokens:
            of = "no batch" if layout is None else f"a batch of {len(layout.slots)} tokens"
            raise ValueError(
                f"{type(module).__name__} was called with {tokens} tokens and the borders of {of}: call the "
                "model through PolicyModel"
            )
        return layout

    def _spread(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """[1, T, H] -> [S, longest, H], wherever the call passes it."""
        kwargs = {name: value for name, value in kwargs.items() if name != "packed"}
        name = next(iter(inspect.signature(module.forward).parameters))
        hidden = args[0] if args else kwargs[name]
        layout = self._borders(module, hidden.shape[1])
        rows = len(layout.cu_seqlens) - 1
        if rows > 1:
            grid = hidden.new_zeros(rows * layout.longest, hidden.shape[2])
            grid = grid.index_copy(0, layout.slots, hidden[0])
            hidden = grid.view(rows, layout.longest, -1)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {name: hidden}

    def _collect(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """[S, longest, H] -> [1, T, H], of the output or of its first part."""
        layout = self._layout
        assert layout is not None  # `_spread` has just used it
        if len(layout.cu_seqlens) == 2:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        packed = hidden.flatten(0, 1).index_select(0, layout.slots)[None]
        return (packed, *output[1:]) if isinstance(output, tuple) else packed


def find_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module with memory, known by the causal convolution over tokens that it holds."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
    }


def check_layers(shape: ModelShape) -> None:
    """Raises ValueError for layers that would see through the borders of packed sequences or past them."""
    odd = sorted(set(shape.layer_kinds) - MEMORY - _PACKED)
    if odd:
        at = shape.layer_kinds.index(odd[0])
        raise ValueError(
            f"model {shape.name} has layers of kind {', '.join(odd)} (the first is layer {at}"
            f"{_limit(shape)}), which the packed attention does not have; use a model with full attention"
        )


def _limit(shape: ModelShape) -> str:
    if shape.window is not None:
        return f", its window {shape.window} tokens"
    return "" if shape.chunk is None else f", its chunks {shape.chunk} tokens"


def check_mixers(shape: ModelShape, model: PreTrainedModel) -> None:
    """Raises ValueError unless every layer with memory holds a module whose sequences are kept apart."""
    found = find_mixers(model)
    for layer in shape.layers_with_memory:
        if not any(f".{layer}." in f".{name}." for name in found):
            raise ValueError(
                f"layer {layer} of {shape.name} is of kind {shape.layer_kinds[layer]}, whose memory cannot "
                "be kept within its sequence; use a model of another family"
            )
