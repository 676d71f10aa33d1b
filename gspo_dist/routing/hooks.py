"""Forward hooks on the routers of one model, which record and replay: the part that does not depend on the kind of
router.

An adapter (`routing.huggingface`, `routing.deepspeed`) says which modules are routers and how the hook of one reads
and rewrites its output; `Taps` then gives it `shape`, `record` and `replay`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar
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


class Tap(ABC):
    """The hooks of one router, and who uses them now. A kind of router says how in `__call__`."""

    def __init__(self, router: nn.Module) -> None:
        self.replay: LayerReplay | None = None
        self.used: list[tuple[RouteRecorder, int]] = []
        self.native: list[tuple[RouteRecorder, int]] = []
        self.handles = [router.register_forward_hook(self)]

    @abstractmethod
    def __call__(self, router: nn.Module, args: object, output: tuple) -> tuple | None:
        """The router's output with the experts that `choose` gives, or None to leave it as it is."""

    @property
    def idle(self) -> bool:
        return self.replay is None and not self.used and not self.native

    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """The router's own ids [T, K] -> those of the replay, if there is one; recorders see them."""
        for recorder, layer in self.native:
            recorder.see(layer, ids)
        if self.replay is not None:
            ids = self.replay.choose(ids)
        for recorder, layer in self.used:
            recorder.see(layer, ids)
        return ids

    def listeners(self, native: bool) -> list[tuple[RouteRecorder, int]]:
        return self.native if native else self.used

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


T = TypeVar("T", bound=Tap)


class Taps(Generic[T]):
    """The taps of all routers of one kind that somebody records or replays now.

    find: model -> name -> router, in the order of the layers; ValueError when there is none. make: hooks one router.
    """

    def __init__(
        self, find: Callable[[nn.Module], dict[str, nn.Module]], make: Callable[[nn.Module], T]
    ) -> None:
        self.find, self.make = find, make
        self._taps: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    def shape(self, model: nn.Module) -> RouterShape:
        """Names, top-k and number of experts of a model's routers."""
        routers = self.find(model)
        sizes = {(r.top_k, r.num_experts) for r in routers.values()}
        if len(sizes) != 1:
            raise ValueError(f"routers of one model must agree in (top_k, num_experts): got {sorted(sizes)}")
        ((top_k, num_experts),) = sizes
        return RouterShape(tuple(routers), top_k, num_experts)

    @contextmanager
    def _tapped(
        self, model: nn.Module, attach: Callable[[T, int], None], detach: Callable[[T], None]
    ) -> Iterator[None]:
        """Attaches to every router's tap; detaches, and removes taps that nobody else uses, whatever happens inside."""
        attached: list[tuple[nn.Module, T]] = []
        try:
            for layer, router in enumerate(self.find(model).values()):
                tap = self._taps.get(router) or self._taps.setdefault(router, self.make(router))
                attached.append((router, tap))
                attach(tap, layer)
            yield
        finally:
            for router, tap in attached:
                detach(tap)
                if tap.idle:
                    tap.remove()
                    self._taps.pop(router, None)

    @contextmanager
    def record(self, model: nn.Module, *, native: bool = False) -> Iterator[RouteRecorder]:
        """Records the experts of the forwards inside the block: `.trace()` for one, `.traces()` for several.

        Under a replay (entered before or after) the replayed experts are recorded; with `native` those that the
        routers would have chosen themselves at that place, which is what a live flip metric compares with the
        replayed ones.
        """
        recorder = RouteRecorder(self.shape(model))

        def attach(tap: T, layer: int) -> None:
            tap.listeners(native).append((recorder, layer))

        def detach(tap: T) -> None:
            seen = tap.listeners(native)
            seen[:] = [entry for entry in seen if entry[0] is not recorder]

        with self._tapped(model, attach, detach):
            yield recorder

    @contextmanager
    def replay(
        self, model: nn.Module, trace: RoutingTrace, *, tokens: int | None = None
    ) -> Iterator[RouteFeeder]:
        """Runs the forward inside the block, and its backward where layers are checkpointed, under `trace`'s experts.

        trace: one row a token of this rank's forward; unknown rows are routed natively. tokens: that number, to
        refuse a truncated trace before the model runs. Raises ValueError for a trace that does not fit,
        RoutingReplayError on leaving unless every router used every route exactly once a pass.
        """
        shape = self.shape(model)
        device = next(model.parameters()).device
        feeder = RouteFeeder([trace], shape, device, recompute=_recomputed(model, shape), tokens=[tokens])
        mine = set(feeder.layers)

        def attach(tap: T, layer: int) -> None:
            if tap.replay is not None:
                raise RoutingReplayError(
                    f"router {shape.names[layer]} is being replayed already: leave that block first"
                )
            tap.replay = feeder.layers[layer]

        def detach(tap: T) -> None:
            if tap.replay in mine:
                tap.replay = None

        with self._tapped(model, attach, detach), feeding(feeder):
            yield feeder


def _recomputed(model: nn.Module, shape: RouterShape) -> list[bool]:
    """For every router, whether the backward will run its forward again (an enclosing layer is checkpointed)."""
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
