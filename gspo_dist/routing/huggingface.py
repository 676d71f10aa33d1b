"""Routing Replay for HF mixture-of-experts models, under plain PyTorch or DeepSpeed ZeRO.

One forward hook a router does both jobs. A hook sees the router's outputs after the engine gathered and used its
weight, and only needs the logits; so ZeRO-3, which partitions weights between calls and has hooks of its own, does
not matter, and gradients flow through the engine's own wrappers of those logits. (A replaced `forward` would have to
repeat the linear layer, and is lost when an engine replaces it too.) Checkpointed layers call the module again, so
the hook also serves the recomputation. torch.compile ignores hooks that are added after compilation
(torch._dynamo.config.skip_nnmodule_hook_guards, torch 2.13): then the once-law of `RouteFeeder` raises instead of
routing natively in silence; compile the experts and the attention, not the routers.
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
    feeding,
)
from gspo_dist.routing.trace import RoutingTrace

Gate = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(router, logits [T, E], ids [T, K]) -> gate weights [T, K], by the router's own formula at the given experts."""


def _softmax_gate(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """softmax over all experts, gathered; renormalised if `norm_topk_prob`, which is the softmax over the chosen set
    (R3, arXiv 2510.11370: g_i = I_i exp(s_i) / sum_j I_j exp(s_j))."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, ids)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def _float32_gate(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The renormalised softmax, left in float32 (Mixtral)."""
    weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True)


def _sigmoid_gate(router: nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sigmoid scores without the selection bias, renormalised, scaled (DeepSeek-V3)."""
    weights = logits.sigmoid().gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor


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
"""Router class of transformers -> gate formula. Each returns (logits, weights, ids); holds top_k, num_experts."""


class _Tap:
    """The hook of one router, and who uses it now."""

    def __init__(self, router: nn.Module) -> None:
        self.gate = GATES[type(router).__name__]
        self.replay: LayerReplay | None = None
        self.used: list[tuple[RouteRecorder, int]] = []
        self.native: list[tuple[RouteRecorder, int]] = []
        self.handle = router.register_forward_hook(self)

    @property
    def idle(self) -> bool:
        return self.replay is None and not self.used and not self.native

    def __call__(self, router: nn.Module, _args: object, output: tuple) -> tuple | None:
        logits, weights, ids = output
        for recorder, layer in self.native:
            recorder.see(layer, ids)
        if self.replay is not None:
            ids = self.replay.choose(ids)
            weights = self.gate(router, logits, ids)
        for recorder, layer in self.used:
            recorder.see(layer, ids)
        return None if self.replay is None else (logits, weights, ids)


_TAPS: WeakKeyDictionary[nn.Module, _Tap] = WeakKeyDictionary()


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> router, in the order of the layers. Raises ValueError when there is none that `GATES` knows."""
    routers = {name: m for name, m in model.named_modules() if type(m).__name__ in GATES}
    if not routers:
        likely = sorted({type(m).__name__ for m in model.modules() if "router" in type(m).__name__.lower()})
        raise ValueError(
            f"routing replay needs a mixture-of-experts model with a known router: got routers {likely or 'none'}; "
            f"known are {', '.join(GATES)}; use routing_replay=none for a dense model"
        )
    return routers


def router_shape(model: nn.Module) -> RouterShape:
    """Names, top-k and number of experts of a model's routers."""
    routers = find_routers(model)
    sizes = {(r.top_k, r.num_experts) for r in routers.values()}
    if len(sizes) != 1:
        raise ValueError(f"routers of one model must agree in (top_k, num_experts): got {sorted(sizes)}")
    (top_k, num_experts), = sizes
    return RouterShape(tuple(routers), top_k, num_experts)


@contextmanager
def _tapped(model: nn.Module, attach: Callable[[_Tap, int], None], detach: Callable[[_Tap], None]) -> Iterator[None]:
    """Attaches to every router's tap; detaches, and removes taps that nobody else uses, whatever happens inside."""
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
                tap.handle.remove()
                _TAPS.pop(router, None)


@contextmanager
def record(model: nn.Module, *, native: bool = False) -> Iterator[RouteRecorder]:
    """Records the experts of the forwards inside the block: `.trace()` for one, `.traces()` for several.

    Under a replay (entered before or after) the replayed experts are recorded; with `native` those that the routers
    would have chosen themselves at that place, which is what a live flip metric compares with the replayed ones.
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
    """Runs the forward inside the block, and its backward where layers are checkpointed, under `trace`'s experts.

    trace: one row a token of the forward; unknown rows are routed natively. tokens: that number, to refuse a
    truncated trace before the model runs. Raises ValueError for a trace that does not fit, RoutingReplayError on
    leaving unless every router used every route exactly once a pass.
    """
    shape = router_shape(model)
    device = next(model.parameters()).device
    feeder = RouteFeeder([trace], shape, device, recompute=_recomputed(model, shape), tokens=[tokens])
    mine = set(feeder.layers)

    def attach(tap: _Tap, layer: int) -> None:
        if tap.replay is not None:
            raise RoutingReplayError(f"router {shape.names[layer]} is being replayed already: leave that block first")
        tap.replay = feeder.layers[layer]

    def detach(tap: _Tap) -> None:
        if tap.replay in mine:
            tap.replay = None

    with _tapped(model, attach, detach), feeding(feeder):
        yield feeder


def _recomputed(model: nn.Module, shape: RouterShape) -> list[bool]:
    """For every router, whether the backward will run its forward again (an enclosing layer is checkpointed)."""
    if not torch.is_grad_enabled():
        return [False] * len(shape.names)
    checkpointed = tuple(
        f"{name}." for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training
    )
    return [name.startswith(checkpointed) for name in shape.names]
