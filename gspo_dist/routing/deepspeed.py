"""Routing Replay for MoE layers that DeepSpeed's AutoEP put in place of HF's (`expert_parallel` above 1).

AutoEP's router returns gate weights, expert ids and the number of tokens per expert, but not its logits. So
two forward hooks per router do the job: one on its gate keeps the logits of the call, and one on the router
replaces the choice and gathers the gate weights anew. As in `routing.huggingface`, hooks see outputs only.
ZeRO-3's partitioned weights therefore do not matter, and the recomputed forward of a checkpointed layer
passes through the hooks too. AutoEP sends tokens to the ranks of their experts by the ids and counts that the
hook returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import nn

from gspo_dist.routing.hooks import RouterHook, RouterHooks
from gspo_dist.routing.huggingface import is_checkpointed

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits.float(), dim=1),
    "sigmoid": lambda logits: torch.sigmoid(logits.float()),
}
"""AutoEP's score functions, over all experts, in float32."""


class AutoEPRouter(Protocol):
    """What this adapter reads of AutoEP's router."""

    gate: nn.Module
    """The linear layer from hidden states to logits."""
    top_k: int
    """Experts per token."""
    num_experts: int
    """Experts of the layer, over all ranks."""
    score_func: str
    """A key of `SCORES`."""
    route_norm: bool
    """Whether the chosen scores are divided by their sum."""
    route_scale: float
    """Factor of every gate weight."""


def gate_weights(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """AutoEP's formula at the given experts: logits [T, E], ids [T, K] -> [T, K] float32, with gradient."""
    auto = cast(AutoEPRouter, router)
    weights = SCORES[auto.score_func](logits).gather(1, ids)
    if auto.route_norm:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * auto.route_scale


class _AutoEPHook(RouterHook):
    """The hooks on one AutoEP router. The gate's logits are kept for the weights at the replayed experts."""

    def __init__(self, router: nn.Module) -> None:
        self.logits: torch.Tensor | None = None
        super().__init__(router)
        self.handles.append(cast(AutoEPRouter, router).gate.register_forward_hook(self._keep))

    def _keep(self, _gate: nn.Module, _args: object, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(
        self, router: nn.Module, args: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        _, native, _ = output
        # Taken and cleared, so that the hook keeps no graph alive between calls.
        logits, self.logits = self.logits, None
        ids = self.choose(native)
        if self.replay is None and not self.watchers:
            return None
        if logits is None:
            raise RuntimeError("AutoEP's router returned without calling its gate: the hook has no logits")
        for watcher, layer in self.watchers:
            watcher.see(layer, logits, ids)
        if self.replay is None:
            return None
        num_experts = cast(AutoEPRouter, router).num_experts
        counts = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
        flat = ids.flatten()
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return gate_weights(router, logits, ids), ids, counts


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> AutoEP router, in the order of the layers. Raises ValueError when there is none."""
    routers = {
        f"{name}.router": cast(nn.Module, module.router)
        for name, module in model.named_modules()
        if getattr(module, "_is_autoep_layer", False)
    }
    if not routers:
        raise ValueError(
            "routing replay of AutoEP layers needs a model that AutoEP converted: got none of them; set "
            "learner.deepspeed.expert_parallel above 1, or use the HF routers' adapter"
        )
    return routers


def router_size(router: nn.Module) -> tuple[int, int]:
    """(top_k, num_experts) of one router."""
    auto = cast(AutoEPRouter, router)
    return auto.top_k, auto.num_experts


_ROUTERS = RouterHooks(find_routers, _AutoEPHook, router_size, is_checkpointed)
record, replay, watch = _ROUTERS.record, _ROUTERS.replay, _ROUTERS.watch
