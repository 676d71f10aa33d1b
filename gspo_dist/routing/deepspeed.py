"""Routing Replay for MoE layers that DeepSpeed's AutoEP put in place of HF's (`expert_parallel` above 1).

AutoEP's router returns (gate weights, ids, tokens an expert), not its logits, so two forward hooks a router
do the job: one on its gate keeps the logits of the call, one on the router replaces the choice and gathers
the gate weights anew. As in `routing.huggingface`, hooks see outputs only, so ZeRO-3's partitioned weights
do not matter, and the recomputed forward of a checkpointed layer passes through them too. The dispatch over
ranks follows the ids and counts that the hook returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gspo_dist.routing.replay import (
    LayerReplay,
    RouteFeeder,
    RouteRecorder,
    RouterShape,
    RoutingReplayError,
    check_trace,
    feeding,
)
from gspo_dist.routing.trace import RoutingTrace

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


class _Tap:
    """The hooks of one router, and who uses them now."""

    def __init__(self, router: nn.Module) -> None:
        self.logits: torch.Tensor | None = None
        self.replay: LayerReplay | None = None
        self.used: list[tuple[RouteRecorder, int]] = []
        self.native: list[tuple[RouteRecorder, int]] = []
        self.handles = [router.gate.register_forward_hook(self._keep), router.register_forward_hook(self)]

    @property
    def idle(self) -> bool:
        return self.replay is None and not self.used and not self.native

    def _keep(self, _gate: nn.Module, _args: object, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, router: nn.Module, _args: object, output: tuple) -> tuple | None:
        _, ids, _ = output
        logits, self.logits = self.logits, None
        for recorder, layer in self.native:
            recorder.see(layer, ids)
        if self.replay is not None:
            ids = self.replay.choose(ids)
        for recorder, layer in self.used:
            recorder.see(layer, ids)
        if self.replay is None:
            return None
        counts = torch.zeros(router.num_experts, dtype=torch.int32, device=ids.device)
        flat = ids.flatten()
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return gate_weights(router, logits, ids), ids, counts


_TAPS: WeakKeyDictionary[nn.Module, _Tap] = WeakKeyDictionary()


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


def router_shape(model: nn.Module) -> RouterShape:
    """Names, top-k and number of experts of a model's routers."""
    routers = find_routers(model)
    sizes = {(r.top_k, r.num_experts) for r in routers.values()}
    if len(sizes) != 1:
        raise ValueError(f"routers of one model must agree in (top_k, num_experts): got {sorted(sizes)}")
    ((top_k, num_experts),) = sizes
    return RouterShape(tuple(routers), top_k, num_experts)


@contextmanager
def _tapped(
    model: nn.Module, attach: Callable[[_Tap, int], None], detach: Callable[[_Tap], None]
) -> Iterator[None]:
    """Attaches to every router's tap; detaches, and removes taps that nobody else uses, whatever happens
    inside."""
    attached: list[tuple[nn.Module, _Tap]] = []
    try:
        for layer, router in enumerate(find_routers(model).values()):
            tap = _TAPS.get(router) or _TAPS.setdefault(router, _Tap(router))
            attached.append((router, tap))
            attach(tap, layer)
        yield
    finally:
        for router, tap in attached:
            detach(tap)
            if tap.idle:
                for handle in tap.handles:
                    handle.remove()
                _TAPS.pop(router, None)


@contextmanager
def record(model: nn.Module, *, native: bool = False) -> Iterator[RouteRecorder]:
    """Records the experts of the forwards inside the block: `.trace()` for one, `.traces()` for several.

    Under a replay the replayed experts are recorded; with `native` those that the routers would have chosen.
    """
    recorder = RouteRecorder(router_shape(model))

    def listeners(tap: _Tap) -> list[tuple[RouteRecorder, int]]:
        return tap.native if native else tap.used

    def attach(tap: _Tap, layer: int) -> None:
        listeners(tap).append((recorder, layer))

    def detach(tap: _Tap) -> None:
        listeners(tap)[:] = [entry for entry in listeners(tap) if entry[0] is not recorder]

    with _tapped(model, attach, detach):
        yield recorder


@contextmanager
def replay(model: nn.Module, trace: RoutingTrace, *, tokens: int | None = None) -> Iterator[RouteFeeder]:
    """Runs the forward inside the block, and its backward where layers are checkpointed, under `trace`'s
    experts.

    trace: one row a token of this rank's forward; unknown rows are routed natively. Raises ValueError for a
    trace that does not fit, RoutingReplayError on leaving unless every router used every route exactly once
    a pass.
    """
    shape = router_shape(model)
    check_trace(trace, shape, tokens=tokens)
    feeder = RouteFeeder([trace], shape, next(model.parameters()).device, recompute=_recomputed(model, shape))
    mine = set(feeder.layers)

    def attach(tap: _Tap, layer: int) -> None:
        if tap.replay is not None:
            raise RoutingReplayError(
                f"router {shape.names[layer]} is being replayed already: leave that block first"
            )
        tap.replay = feeder.layers[layer]

    def detach(tap: _Tap) -> None:
        if tap.replay in mine:
            tap.replay = None

    with _tapped(model, attach, detach), feeding(feeder):
        yield feeder


def _recomputed(model: nn.Module, shape: RouterShape) -> list[bool]:
    """For every router, whether the backward will run its forward again (an enclosing layer is
    checkpointed)."""
    if not torch.is_grad_enabled():
        return [False] * len(shape.names)
    checkpointed = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and module.training
    )
    return [name.startswith(checkpointed) for name in shape.names]
