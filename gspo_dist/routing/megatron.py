"""Routing Replay for the megatron-core learner, at megatron's own extension point.

megatron-core hands `router.router_replay.get_replay_topk` the choice of experts. Its own `RouterReplay` (0.16.1)
replays ids as they are: padding or unrecorded rows would crash or break the all-to-all, its list of targets must be
fed and cleared by hand around every micro-batch of a pipeline, and nothing says when a route was not used. So a
`_Handle` of ours stands there, fed by the bookkeeping that all backends share (`routing.replay`): unknown rows are
routed natively, forward and recomputed forward advance separately, each route is used exactly once or it raises.

Rows: a router sees its context rank's tokens and, under sequence parallelism, its tensor rank's part of them.
Columns: a pipeline stage has some of the MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from gspo_dist.routing.replay import LayerReplay, RouteFeeder, RouteRecorder, RouterShape, feeding
from gspo_dist.routing.trace import RoutingTrace, id_dtype


class _Handle:
    """Stands as `router.router_replay`: the router's own choice, or the recorded one, seen by a recorder."""

    def __init__(self) -> None:
        self.replay: LayerReplay | None = None
        self.recorder: RouteRecorder | None = None
        self.layer = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [N, E] -> scores and ids of the chosen experts, [N, K] each; the scores are the current ones."""
        values, ids = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.replay is not None:
            ids = self.replay.choose(ids)
            values = scores.gather(1, ids)
        if self.recorder is not None:
            self.recorder.see(self.layer, ids)
        return values, ids


class Placed(Protocol):
    """A micro-batch and where its tokens went on this rank: `source[i]` is the token of local row i, -1 for padding."""

    batch: Any
    source: Tensor


class Routers:
    """This rank's routers, with the block in which they replay and the block in which they record."""

    def __init__(
        self,
        routers: Sequence[Any],
        moe_layers: Sequence[bool],
        top_k: int,
        num_experts: int,
        recompute: bool,
        sequence_parallel: bool,
    ) -> None:
        """moe_layers[i]: layer i of the whole model has experts. recompute: the backward runs the routers again."""
        self.num_layers, self.top_k, self.num_experts = sum(moe_layers), top_k, num_experts
        self.recompute, self.sequence_parallel = recompute, sequence_parallel
        depth = np.cumsum(moe_layers) - 1
        self.columns = [int(depth[router.layer_number - 1]) for router in routers]
        self.shape = RouterShape(
            tuple(f"decoder.layers.{r.layer_number - 1}.mlp.router" for r in routers), top_k, num_experts
        )
        self.handles = [_Handle() for _ in routers]
        for layer, (router, handle) in enumerate(zip(routers, self.handles, strict=True)):
            if router.config.moe_router_fusion:
                raise ValueError("moe_router_fusion returns before routes can be replayed: it must be off")
            handle.layer = layer
            router.router_replay = handle

    def _rows(self, source: Tensor) -> np.ndarray:
        if self.sequence_parallel:
            source = source.chunk(mpu.get_tensor_model_parallel_world_size())[
                mpu.get_tensor_model_parallel_rank()
            ]
        return source.cpu().numpy()

    @contextmanager
    def replaying(self, items: Sequence[Placed]) -> Iterator[None]:
        """Runs the schedule inside (forward and, under grad, backward) under the traces that the batches carry.

        No trace anywhere: no replay. A batch without one among others with one is routed natively.
        """
        if all(item.batch.routing is None for item in items):
            yield
            return
        if not self.num_layers:
            raise ValueError(
                "routing replay needs a mixture-of-experts model: use routing_replay=none for a dense one"
            )
        traces = [self._local(item) for item in items]
        feeder = RouteFeeder(
            traces,
            self.shape,
            torch.cuda.current_device(),
            columns=self.columns,
            recompute=self.recompute and torch.is_grad_enabled(),
        )
        for handle, layer in zip(self.handles, feeder.layers, strict=True):
            handle.replay = layer
        try:
            with feeding(feeder) if self.handles else nullcontext():
                yield
        finally:
            for handle in self.handles:
                handle.replay = None

    def _local(self, item: Placed) -> RoutingTrace:
        """The rows of the batch's trace that this rank's routers see; padding and unrecorded rows are unknown."""
        trace, rows = item.batch.routing, self._rows(item.source)
        if trace is None:
            shape = (len(rows), self.num_layers, self.top_k)
            return RoutingTrace(
                np.zeros(shape, id_dtype(self.num_experts)), np.zeros(len(rows), np.bool_), self.num_experts
            )
        if len(trace) != item.batch.num_tokens:
            raise ValueError(
                f"routing trace must have one row a token: got {len(trace)} for {item.batch.num_tokens} tokens; mark "
                "unrecorded rows unknown instead of cutting them"
            )
        return RoutingTrace(trace.expert_ids[rows], trace.known[rows] & (rows >= 0), self.num_experts)

    @contextmanager
    def recording(self) -> Iterator[RouteRecorder]:
        """Records what this rank's routers use inside the block; `gather` makes whole traces of it."""
        recorder = RouteRecorder(self.shape)
        for handle in self.handles:
            handle.recorder = recorder
        try:
            yield recorder
        finally:
            for handle in self.handles:
                handle.recorder = None

    def gather(self, recorder: RouteRecorder, items: Sequence[Placed]) -> list[RoutingTrace]:
        """One whole trace a micro-batch, on every rank of the replica (collective).

        Every token of every layer was routed on exactly one rank, so the sum over tensor, context and pipeline ranks
        puts the parts together.
        """
        if not self.num_layers:
            raise ValueError("recording routes needs a mixture-of-experts model: use routing_replay=none")
        mine = recorder.traces()[: len(items)] if self.handles else [None] * len(items)
        out = []
        for item, trace in zip(items, mine, strict=True):
            whole = np.zeros((item.batch.num_tokens, self.num_layers, self.top_k), np.int32)
            rows = self._rows(item.source)
            if trace is not None:
                real = rows >= 0
                whole[np.ix_(rows[real], self.columns)] = trace.expert_ids[real]
            total = torch.from_numpy(whole).to(torch.cuda.current_device())
            for group in (
                mpu.get_tensor_and_context_parallel_group(),
                mpu.get_pipeline_model_parallel_group(),
            ):
                dist.all_reduce(total, group=group)
            known = np.ones(item.batch.num_tokens, np.bool_)
            out.append(
                RoutingTrace(total.cpu().numpy().astype(id_dtype(self.num_experts)), known, self.num_experts)
            )
        return out
