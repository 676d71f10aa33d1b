"""Routing Replay for MoE layers that DeepSpeed's AutoEP put in place of HF's (`expert_parallel` above 1).

AutoEP's router returns (gate weights, ids, tokens an expert), not its logits, so two forward hooks a router
do the job: one on its gate keeps the logits of the call, one on the router replaces the choice and gathers
the gate weights anew. As in `routing.huggingface`, hooks see outputs only, so ZeRO-3's partitioned weights
do not matter, and the recomputed forward of a checkpointed layer passes through them too. The dispatch over
ranks follows the ids and counts that the hook returns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gspo_dist.routing.hooks import Tap, Taps

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits.float(), dim=1),
    "sigmoid": lambda logits: torch.sigmoid(logits.float()),
}
"""AutoEP's score functions, over all experts, in float32."""


def gate_weights(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """AutoEP's formula at the given experts: logits [T, E], ids [T, K] -> [T, K] float32, with gradient."""
    weights = SCORES[router.score_func](logits).gather(1, ids)
    if router.route_norm:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.route_scale


class _Tap(Tap):
    """The hooks of one AutoEP router: the gate's logits are kept for the gate weights at the replayed experts."""

    def __init__(self, router: nn.Module) -> None:
        self.logits: torch.Tensor | None = None
        super().__init__(router)
        self.handles.append(router.gate.register_forward_hook(self._keep))

    def _keep(self, _gate: nn.Module, _args: object, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, router: nn.Module, _args: object, output: tuple) -> tuple | None:
        _, native, _ = output
        logits, self.logits = self.logits, None
        ids = self.choose(native)
        if self.replay is None:
            return None
        counts = torch.zeros(router.num_experts, dtype=torch.int32, device=ids.device)
        flat = ids.flatten()
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return gate_weights(router, logits, ids), ids, counts


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> AutoEP router, in the order of the layers. Raises ValueError when there is none."""
    routers = {
        f"{name}.router": module.router
        for name, module in model.named_modules()
        if getattr(module, "_is_autoep_layer", False)
    }
    if not routers:
        raise ValueError(
            "routing replay of AutoEP layers needs a model that AutoEP converted: got none of them; set "
            "learner.deepspeed.expert_parallel above 1, or use the HF routers' adapter"
        )
    return routers


_ROUTERS = Taps(find_routers, _Tap)
router_shape, record, replay = _ROUTERS.shape, _ROUTERS.record, _ROUTERS.replay
