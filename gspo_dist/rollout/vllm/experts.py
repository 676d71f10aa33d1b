"""Stacks of experts into vLLM's layers, three calls a layer instead of three per expert.

Written for vllm 0.30.0, whose `RoutedExperts.weight_loader` takes the weights of all experts of a layer as
one tensor too. Which of two ways a layer goes depends on its kernel:

- Where the kernel computes on the layout of the checkpoint (Triton), the tensors in use are written in place.
- Everywhere else (CPU, FlashInfer, ...) the whole layer goes through vLLM's layerwise reload.

What neither way takes (quantised layers, other names) is taken apart again for the model's own loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.platforms import current_platform

from gspo_dist.weights.stacks import Stack, unstack
from gspo_dist.weights.stream import NamedTensor

SHARDS = {"gate_proj": "w1", "w1": "w1", "up_proj": "w3", "w3": "w3", "down_proj": "w2", "w2": "w2"}
"""A folder's projections -> vLLM's. Each is a part of the parameter w13_weight or all of w2_weight."""


def takes_stacks(layer: RoutedExperts) -> bool:
    """Whether all experts of this layer can be loaded at once: plain weights, one copy of each expert."""
    moe = layer.moe_config
    return (
        type(layer.quant_method) is UnquantizedFusedMoEMethod
        and not moe.has_bias
        and moe.num_experts == moe.num_logical_experts
        and not layer.expert_map_manager.num_fused_shared_experts
        and not any(getattr(p, "is_transposed", False) for p in layer.parameters())
    )


def in_place(layer: RoutedExperts) -> bool:
    """Whether the kernel computes on the layout of the checkpoint, so that a copy is all there is to do."""
    return (
        layer.quant_method.unquantized_backend == UnquantizedMoeBackend.TRITON
        and not current_platform.is_rocm()  # which may pad the weights
    )


class StackLoader:
    """The MoE layers of one model during one update. Made after the layerwise reload was opened."""

    def __init__(self, model: torch.nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, RoutedExperts) and takes_stacks(m)]
        self.layers: dict[str, Any] = {layer.layer_name: layer for layer in layers}
        self.waiting: dict[tuple[str, tuple[str, ...]], dict[int, torch.Tensor]] = {}
        """Parts of a layer's stack, by their first expert, until it is whole."""
        for layer in layers:
            if in_place(layer):
                info = get_layerwise_info(layer)
                if info.can_load():  # the reload has put the tensors in use aside: they come back
                    _place_kernel_tensors(layer, info)
                    info.reset()

    def load(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Loads the stacks among `tensors`, and yields everything that the model's own loader has to take."""
        for name, tensor in tensors:
            stack = Stack.parse(name)
            layer = self.layers.get(stack.prefix) if stack is not None else None
            if stack is None or layer is None or not all(p in SHARDS for p in stack.projections):
                yield from unstack([(name, tensor)])
            elif in_place(layer):
                load_experts(layer, stack, tensor)
            else:
                whole = self._whole(stack, tensor, layer.moe_config.num_experts)
                if whole is not None:
                    load_experts(layer, Stack(stack.prefix, 0, len(whole), stack.projections, ""), whole)

    def _whole(self, stack: Stack, tensor: torch.Tensor, experts: int) -> torch.Tensor | None:
        """All experts of the layer in order once the last of them has come, else None."""
        if stack.count == experts:
            return tensor
        key = (stack.prefix, stack.projections)
        parts = self.waiting.setdefault(key, {})
        parts[stack.first] = tensor
        if sum(len(part) for part in parts.values()) < experts:
            return None
        return torch.cat([part for _, part in sorted(self.waiting.pop(key).items())])


def load_experts(layer: Any, stack: Stack, tensor: torch.Tensor) -> None:
    """Copies the experts of `tensor` [experts, rows of all projections, ...] that this worker holds.

    vLLM's own loader cuts the rows or columns of a tensor-parallel worker out of each. Example: worker 1 of 2
    with expert parallelism holds the experts 4 to 7 of 8 at its places 0 to 3; of a stack of the experts
    2 to 5 it takes the last two.
    """
    places = [layer._map_global_expert_id_to_local_expert_id(stack.first + e) for e in range(stack.count)]
    mine = [e for e, place in enumerate(places) if place != -1]
    if not mine:
        return
    held = [places[e] for e in mine]
    if held != list(range(held[0], held[0] + len(held))):
        raise ValueError(f"{layer.layer_name} holds experts in another order than the model: {places}")
    in_a_row = mine[-1] - mine[0] + 1 == len(mine)
    experts = tensor[mine[0] : mine[-1] + 1] if in_a_row else tensor[mine]
    for projection, rows in zip(stack.projections, experts.chunk(len(stack.projections), dim=1), strict=True):
        shard = SHARDS[projection]
        name = "w2_weight" if shard == "w2" else "w13_weight"
        parameter = getattr(layer, name)
        told = {
            "loaded_weight": rows,
            "weight_name": name,
            "shard_id": shard,
            "expert_id": stack.first + mine[0],
            "return_success": True,
        }
        if in_place(layer):
            block = parameter.data[held[0] : held[0] + len(held)]
            layer.weight_loader(param=torch.nn.Parameter(block, requires_grad=False), **told)
        else:
            # The parameter's own: during a layerwise reload it waits for the layer, then packs it.
            parameter.weight_loader(param=parameter, **told)
