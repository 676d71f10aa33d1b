"""Forward hooks on the routers of one model, which record and replay their choices.

This module holds what does not depend on the kind of router. An adapter (`routing.huggingface`,
`routing.deepspeed`) says which modules are routers and how the hook of one reads and rewrites its output.
`RouterHooks` then gives the adapter its three functions: `shape`, `record` and `replay`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gspo_dist.routing.replay import (
    LayerReplay,
    RouteFeeder,
    RouteRecorder,
    RouterShape,
    RoutingReplayError,
    feeding,
)
from gspo_dist.routing.scores import Watcher
from gspo_dist.routing.trace import RoutingTrace


class RouterHook(ABC):
    """The hooks on one router and who uses them now. A subclass says in `__call__` how its kind works."""

    def __init__(self, router: nn.Module) -> None:
        self.replay: LayerReplay | None = None
        self.recorders: list[tuple[RouteRecorder, int]] = []
        self.watchers: list[tuple[Watcher, int]] = []
        self.handles = [router.register_forward_hook(self)]

    @abstractmethod
    def __call__(self, router: nn.Module, args: Any, output: Any) -> Any:
        """The router's output with the experts that `choose` gives, or None to leave it as it is."""

    @property
    def idle(self) -> bool:
        """True when nobody records or replays here, so that the hooks can go."""
        return self.replay is None and not self.recorders and not self.watchers

    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """The router's own ids [T, K] -> the ids to use: those of the replay where there is one.

        Every recorder sees the result.
        """
        if self.replay is not None:
            ids = self.replay.choose(ids)
        for recorder, layer in self.recorders:
            recorder.see(layer, ids)
        return ids

    def remove(self) -> None:
        """Takes the hooks off the router."""
        for handle in self.handles:
            handle.remove()


H = TypeVar("H", bound=RouterHook)


class RouterHooks(Generic[H]):
    """The hooks on all routers of one kind that somebody records or replays now."""

    def __init__(
        self,
        find: Callable[[nn.Module], Mapping[str, nn.Module]],
        make: Callable[[nn.Module], H],
        size: Callable[[nn.Module], tuple[int, int]],
        checkpoints: Callable[[nn.Module], bool],
    ) -> None:
        """
        find: model -> name -> router, in the order of the layers; ValueError when there is none.
        make: router -> its hook.
        size: router -> (top_k, num_experts).
        checkpoints: module -> whether the backward runs its forward again.
        """
        self.find, self.make, self.size, self.checkpoints = find, make, size, checkpoints
        self._hooks: WeakKeyDictionary[nn.Module, H] = WeakKeyDictionary()

    def shape(self, model: nn.Module) -> RouterShape:
        """Names, top-k and number of experts of a model's routers. ValueError when they are not alike."""
        routers = self.find(model)
        sizes = {self.size(router) for router in routers.values()}
        if len(sizes) != 1:
            raise ValueError(f"routers of one model must agree in (top_k, num_experts): got {sorted(sizes)}")
        ((top_k, num_experts),) = sizes
        return RouterShape(tuple(routers), top_k, num_experts)

    @contextmanager
    def _hooked(
        self, model: nn.Module, attach: Callable[[H, int], None], detach: Callable[[H], None]
    ) -> Iterator[None]:
        """Attaches to every router's hook and detaches on leaving, whatever happens inside.

        A hook that nobody else uses is removed.
        """
        attached: list[tuple[nn.Module, H]] = []
        try:
            for layer, router in enumerate(self.find(model).values()):
                # Record and replay of one model share a hook: two hooks would run in the order of entry.
                hook = self._hooks.get(router) or self._hooks.setdefault(router, self.make(router))
                attached.append((router, hook))
                attach(hook, layer)
            yield
        finally:
            for router, hook in attached:
                detach(hook)
                if hook.idle:
                    hook.remove()
                    self._hooks.pop(router, None)

    @contextmanager
    def record(self, model: nn.Module) -> Iterator[RouteRecorder]:
        """Records the experts that the forwards inside the block use.

        Take `.trace()` of the recorder after one forward and `.traces()` after several. Under a replay,
        entered before or after, the replayed experts are recorded.
        """
        recorder = RouteRecorder(self.shape(model))

        def attach(hook: H, layer: int) -> None:
            hook.recorders.append((recorder, layer))

        def detach(hook: H) -> None:
            hook.recorders[:] = [entry for entry in hook.recorders if entry[0] is not recorder]

        with self._hooked(model, attach, detach):
            yield recorder

    @contextmanager
    def watch(self, model: nn.Module, watcher: Watcher) -> Iterator[None]:
        """Shows `watcher` the logits and the experts of every router while forwards run inside the block."""

        def attach(hook: H, layer: int) -> None:
            hook.watchers.append((watcher, layer))

        def detach(hook: H) -> None:
            hook.watchers[:] = [entry for entry in hook.watchers if entry[0] is not watcher]

        with self._hooked(model, attach, detach):
            yield

    @contextmanager
    def replay(
        self, model: nn.Module, trace: RoutingTrace, *, tokens: int | None = None
    ) -> Iterator[RouteFeeder]:
        """Runs the forward inside the block under `trace`'s experts.

        The backward belongs in the block too where layers are checkpointed, because it
        runs the routers again.

        trace: one row per token of this rank's forward. Unknown rows are routed natively.
        tokens: the number of tokens, where known, to refuse a truncated trace before the model runs.

        Raises ValueError for a trace that does not fit. Raises RoutingReplayError for a second replay of the
        same model, and on leaving unless every router used every route exactly once per pass.
        """
        shape = self.shape(model)
        device = next(model.parameters()).device
        feeder = RouteFeeder(
            [trace], shape, device, recompute=self._recomputed(model, shape), tokens=[tokens]
        )
        mine = set(feeder.layers)

        def attach(hook: H, layer: int) -> None:
            if hook.replay is not None:
                raise RoutingReplayError(
                    f"router {shape.names[layer]} is being replayed already: leave that block first"
                )
            hook.replay = feeder.layers[layer]

        def detach(hook: H) -> None:
            # After a refused second replay, the hook still belongs to the first.
            if hook.replay in mine:
                hook.replay = None

        with self._hooked(model, attach, detach), feeding(feeder):
            yield feeder

    def _recomputed(self, model: nn.Module, shape: RouterShape) -> list[bool]:
        """For every router, whether an enclosing layer is checkpointed: then the backward runs it again."""
        if not torch.is_grad_enabled():
            return [False] * len(shape.names)
        again = tuple(f"{name}." for name, module in model.named_modules() if self.checkpoints(module))
        return [name.startswith(again) for name in shape.names]
