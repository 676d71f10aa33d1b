"""Routing Replay for HF mixture-of-experts models, under plain PyTorch or DeepSpeed ZeRO.

One forward hook per router does both jobs. A hook sees the router's outputs after the engine gathered and
used its weight, and needs only the logits. So ZeRO-3, which partitions weights between calls and has hooks of
its own, does not matter, and gradients flow through the engine's own wrappers of those logits. A replaced
`forward` would have to repeat the linear layer, and is lost when an engine replaces it too. Checkpointed
layers call the module again, so the hook also serves the recomputation.

torch.compile ignores hooks that are added after compilation (torch 2.13,
torch._dynamo.config.skip_nnmodule_hook_guards). `RouteFeeder` then raises, because the routes were not used.
Nothing is routed natively in silence. Compile the experts and the attention, not the routers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gspo_dist.routing.hooks import RouterHook, RouterHooks


class TopKRouter(Protocol):
    """What this adapter reads of an HF router."""

    top_k: int
    """Experts per token."""
    num_experts: int
    """Experts of the layer."""


class SigmoidRouter(TopKRouter, Protocol):
    """A router with sigmoid scores."""

    norm_topk_prob: bool
    """Whether the chosen scores are divided by their sum."""
    routed_scaling_factor: float
    """Factor of every gate weight."""


Gate = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(router, logits [T, E], ids [T, K]) -> gate weights [T, K] by the router's own formula at those experts."""


def _softmax_gate(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The softmax over all experts, gathered at `ids`, and renormalised if `norm_topk_prob`.

    Renormalised it is the softmax over the chosen set: R3 (arXiv 2510.11370) has
    g_i = I_i exp(s_i) / sum_j I_j exp(s_j).
    """
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, ids)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def _float32_gate(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The renormalised softmax, left in float32 (Mixtral)."""
    weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True)


def _sigmoid_gate(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sigmoid scores without the selection bias, renormalised and scaled (DeepSeek-V3)."""
    sigmoid = cast(SigmoidRouter, router)
    weights = logits.sigmoid().gather(1, ids)
    if sigmoid.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * sigmoid.routed_scaling_factor


GATES: dict[str, Gate] = {
    "Qwen2MoeTopKRouter": _softmax_gate,
    "Qwen3MoeTopKRouter": _softmax_gate,
    "Qwen3NextTopKRouter": _softmax_gate,
    "Qwen3_5MoeTopKRouter": _softmax_gate,  # no flag: always renormalised
    "OlmoeTopKRouter": _softmax_gate,
    "MixtralTopKRouter": _float32_gate,
    "DeepseekV3TopkRouter": _sigmoid_gate,
    "Glm4MoeTopkRouter": _sigmoid_gate,
}
"""Router class of transformers -> gate formula. Each returns (logits, weights, ids)."""


class _TopKHook(RouterHook):
    """The hook on one HF router. It computes the gate weights anew at the replayed experts."""

    def __init__(self, router: nn.Module) -> None:
        self.gate = GATES[type(router).__name__]
        super().__init__(router)

    def __call__(
        self, router: nn.Module, args: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        logits, _, native = output
        ids = self.choose(native)
        return None if self.replay is None else (logits, self.gate(router, logits, ids), ids)


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> router, in the order of the layers. Raises ValueError when there is none that `GATES` knows."""
    routers = {name: m for name, m in model.named_modules() if type(m).__name__ in GATES}
    if not routers:
        likely = sorted({type(m).__name__ for m in model.modules() if "router" in type(m).__name__.lower()})
        raise ValueError(
            f"routing replay needs a mixture-of-experts model with a known router: got routers "
            f"{likely or 'none'}; known are {', '.join(GATES)}; use routing_replay=none for a dense model"
        )
    return routers


def router_size(router: nn.Module) -> tuple[int, int]:
    """(top_k, num_experts) of one router."""
    top = cast(TopKRouter, router)
    return top.top_k, top.num_experts


def is_checkpointed(module: nn.Module) -> bool:
    """Whether the backward runs this layer's forward again.

    Only the layer counts. The model around it carries the same flag and is not run again.
    """
    return (
        isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training
    )


_ROUTERS = RouterHooks(find_routers, _TopKHook, router_size, is_checkpointed)
record, replay = _ROUTERS.record, _ROUTERS.replay
