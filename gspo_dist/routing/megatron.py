"""Routing Replay for the megatron-core learner, at megatron's own extension point.

megatron-core hands `router.router_replay.get_replay_topk` the choice of experts. Its own `RouterReplay`
(0.16.1) does not serve here:

- it replays ids as they are, so padding or unrecorded rows would crash or break the all-to-all;
- its list of targets must be fed and cleared by hand around every micro-batch of a pipeline;
- nothing says when a route was not used.

So a `_Handle` stands in its place, fed by the bookkeeping that all backends share (`routing.replay`).

Rows: a router sees its context rank's tokens and, under sequence parallelism, its tensor rank's part of them.
Columns: a pipeline stage has some of the MoE layers.

Example, tensor parallel 2 with sequence parallelism, five tokens and one row of padding: `source` is
[0 1 2 3 4 -1] on both ranks, the routers of tensor rank 1 see rows [3 4 -1], and the last of them is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from gspo_dist.routing.replay import LayerReplay, RouteFeeder, RouteRecorder, RouterShape, feeding
from gspo_dist.routing.scores import ScoreRecorder, ShiftMeter, Watcher
from gspo_dist.routing.trace import RouterScores, RoutingTrace, id_dtype
from gspo_dist.types import PackedBatch

TopK: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""(scores [N, E], k, num_groups, group_topk) -> the k best scores and their ids, [N, K] each."""


class _Handle:
    """Stands as `router.router_replay`: it gives the router's own choice or the recorded one."""

    def __init__(self, layer: int) -> None:
        """layer: the router's place among this rank's routers."""
        self.layer = layer
        self.replay: LayerReplay | None = None
        self.recorder: RouteRecorder | None = None
        self.watcher: Watcher | None = None
        self.logits: Tensor | None = None

    def show(self, logits: Tensor) -> None:
        """The router's logits [N, E], before it chooses.

        What it chooses by may be their softmax, or that with a bias.
        """
        if self.watcher is not None:
            self.logits = logits.detach()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [N, E] -> the current scores and the ids of the chosen experts, [N, K] each.

        The signature is megatron-core's, which passes its own top-k as the last argument.
        """
        if default_compute_topk is None:
            raise ValueError("megatron-core must pass its own top-k to router_replay: got None")
        values, ids = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.replay is not None:
            ids = self.replay.choose(ids)
            values = scores.gather(1, ids)
        if self.recorder is not None:
            self.recorder.see(self.layer, ids)
        if self.watcher is not None:
            if self.logits is None:
                raise RuntimeError("megatron-core's router chose without showing its logits first")
            self.watcher.see(self.layer, self.logits, ids)
            self.logits = None
        return values, ids


class MicroBatch(Protocol):
    """A micro-batch and where its tokens went on this rank."""

    @property
    def batch(self) -> PackedBatch:
        """The packed batch of the whole replica."""

    @property
    def source(self) -> Tensor:
        """[t] int64: the token of the packed batch in each local row, -1 for padding."""


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
        """
        routers: megatron-core's routers of this rank, in the order of the layers.
        moe_layers: per layer of the whole model, whether it has experts.
        recompute: whether the backward runs the routers' forward again.
        sequence_parallel: whether tensor ranks hold a part of the rows each.

        Raises ValueError for a fused router.
        """
        self.num_layers, self.top_k, self.num_experts = sum(moe_layers), top_k, num_experts
        self.recompute, self.sequence_parallel = recompute, sequence_parallel
        # moe_layers T F T gives depths 0 0 1: layer 2 is column 1 of a trace.
        depth = np.cumsum(moe_layers) - 1
        self.columns = [int(depth[router.layer_number - 1]) for router in routers]
        self.shape = RouterShape(
            tuple(f"decoder.layers.{r.layer_number - 1}.mlp.router" for r in routers), top_k, num_experts
        )
        self.handles = [_Handle(layer) for layer in range(len(routers))]
        for router, handle in zip(routers, self.handles, strict=True):
            if router.config.moe_router_fusion:
                raise ValueError("moe_router_fusion returns before routes can be replayed: it must be off")
            router.router_replay = handle

    def _rows(self, source: Tensor) -> np.ndarray:
        """The part of `source` [t] that this rank's routers see."""
        if self.sequence_parallel:
            source = source.chunk(mpu.get_tensor_model_parallel_world_size())[
                mpu.get_tensor_model_parallel_rank()
            ]
        return source.cpu().numpy()

    @contextmanager
    def replaying(self, items: Sequence[MicroBatch]) -> Iterator[None]:
        """Runs the schedule inside under the traces that the batches carry.

        The schedule runs the forward and, under grad, the backward. Without any trace there is no replay. A
        batch without one among others with one is routed natively.

        Raises ValueError for a dense model or a trace that does not fit. Raises RoutingReplayError on leaving
        unless every router used every route exactly once per pass.
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
            _device(),
            columns=self.columns,
            recompute=self.recompute and torch.is_grad_enabled(),
        )
        for handle, layer in zip(self.handles, feeder.layers, strict=True):
            handle.replay = layer
        try:
            # A stage of dense layers only has no router that could use a route.
            with feeding(feeder) if self.handles else nullcontext():
                yield
        finally:
            for handle in self.handles:
                handle.replay = None

    def _local(self, item: MicroBatch) -> RoutingTrace:
        """The rows of the batch's trace that this rank's routers see. Padding rows are unknown."""
        trace, rows = item.batch.routing, self._rows(item.source)
        if trace is None:
            shape = (len(rows), self.num_layers, self.top_k)
            return RoutingTrace(
                np.zeros(shape, id_dtype(self.num_experts)), np.zeros(len(rows), np.bool_), self.num_experts
            )
        if len(trace) != item.batch.num_tokens:
            raise ValueError(
                f"routing trace must have one row per token: got {len(trace)} for {item.batch.num_tokens} "
                "tokens; mark unrecorded rows unknown instead of cutting them"
            )
        # Row -1, padding, takes the last token's ids: they are marked unknown, so nobody looks at them.
        return RoutingTrace(trace.expert_ids[rows], trace.known[rows] & (rows >= 0), self.num_experts)

    @contextmanager
    def recording(self) -> Iterator[RouteRecorder]:
        """Records what this rank's routers use inside the block. `gather` makes whole traces of it."""
        recorder = RouteRecorder(self.shape)
        for handle in self.handles:
            handle.recorder = recorder
        try:
            yield recorder
        finally:
            for handle in self.handles:
                handle.recorder = None

    def gather(self, recorder: RouteRecorder, items: Sequence[MicroBatch]) -> list[RoutingTrace]:
        """One whole trace per micro-batch, on every rank of the replica (collective).

        Every token of every layer was routed on exactly one rank, because a mixture of experts under
        tensor parallelism is sequence parallel too. So the sum over tensor, context and pipeline ranks
        puts the parts together.

        Raises ValueError for a dense model.
        """
        if not self.num_layers:
            raise ValueError("recording routes needs a mixture-of-experts model: use routing_replay=none")
        # Copies of a micro-batch may follow the items: they filled up a pipeline, and nobody asks for theirs.
        mine: list[RoutingTrace | None] = [None] * len(items)
        if self.handles:
            mine = [*recorder.traces()[: len(items)]]
        out = []
        for item, trace in zip(items, mine, strict=True):
            ids = None if trace is None else torch.from_numpy(trace.expert_ids.astype(np.int32))
            whole = self._whole(item, ids, torch.int32).cpu().numpy().astype(id_dtype(self.num_experts))
            out.append(RoutingTrace(whole, np.ones(len(whole), np.bool_), self.num_experts))
        return out

    def _whole(self, item: MicroBatch, part: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[T, L, K] of the packed batch, from every rank's part: its rows and its columns (collective)."""
        whole = torch.zeros(
            (item.batch.num_tokens, self.num_layers, self.top_k), dtype=dtype, device=_device()
        )
        if part is not None:
            rows = self._rows(item.source)
            real = torch.from_numpy(rows >= 0)
            tokens = torch.from_numpy(rows)[real].to(whole.device)
            columns = torch.tensor(self.columns, device=whole.device)
            whole[tokens[:, None], columns] = part[real.to(part.device)].to(whole)
        for group in (mpu.get_tensor_and_context_parallel_group(), mpu.get_pipeline_model_parallel_group()):
            dist.all_reduce(whole, group=group)
        return whole

    # ---- what the routers think of the experts (objective rspo)

    @contextmanager
    def _watched(self, watcher: Watcher) -> Iterator[None]:
        for handle in self.handles:
            handle.watcher = watcher
        try:
            yield
        finally:
            for handle in self.handles:
                handle.watcher = handle.logits = None

    @contextmanager
    def scoring(self) -> Iterator[ScoreRecorder]:
        """Records what this rank's routers think of the experts they use. `gather_scores` makes it whole.

        Raises ValueError for a dense model.
        """
        if not self.num_layers:
            raise ValueError("router scores need a mixture-of-experts model, whose routers move: use gmpo")
        recorder = ScoreRecorder()
        with self._watched(recorder):
            yield recorder

    def gather_scores(self, recorder: ScoreRecorder, items: Sequence[MicroBatch]) -> list[RouterScores]:
        """The scores of whole micro-batches, on the host of every rank of the replica (collective)."""
        # As in `gather`: copies that filled up a pipeline come last.
        mine = recorder.passes()[: len(items)]
        ids: list[Tensor | None] = [scores.expert_ids for scores in mine] or [None] * len(items)
        logprobs: list[Tensor | None] = [scores.logprobs for scores in mine] or [None] * len(items)
        return [
            RouterScores(
                self._whole(item, some, torch.int32).cpu(), self._whole(item, other, torch.float32).cpu()
            )
            for item, some, other in zip(items, ids, logprobs, strict=True)
        ]

    @contextmanager
    def metering(self, items: Sequence[MicroBatch]) -> Iterator[ShiftMeter]:
        """Measures how far this rank's routers have moved since the old policy.

        Its scores are in the batches. `shift` puts the ranks' parts together.
        """
        old = []
        for item in items:
            scores = item.batch.old_router
            if scores is None:
                raise ValueError("a micro-batch has no router scores, and others have them")
            # Row -1, padding, takes the last token's scores: nothing is predicted from there.
            rows = torch.from_numpy(self._rows(item.source))
            own = (x[rows][:, self.columns] for x in (scores.expert_ids, scores.logprobs))
            old.append(RouterScores(*(x.to(_device()) for x in own)))
        meter = ShiftMeter(*old)
        with self._watched(meter):
            yield meter

    def shift(self, meter: ShiftMeter, at: int) -> Tensor:
        """[t]: of micro-batch `at`, as `ShiftMeter.shift`, at every row of this context rank.

        Collective over the tensor ranks, which have a part of the rows each, and over the pipeline's stages,
        which have a part of the layers each. So with a pipeline it waits until every stage has measured.
        """
        total = meter.totals[at]
        if total is None:  # a stage of dense layers only
            total = torch.zeros(len(meter.old[at].expert_ids), device=_device())
        if self.sequence_parallel:
            parts = [torch.empty_like(total) for _ in range(mpu.get_tensor_model_parallel_world_size())]
            dist.all_gather(parts, total.contiguous(), group=mpu.get_tensor_model_parallel_group())
            total = torch.cat(parts)
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            total = total.clone()
            dist.all_reduce(total, group=mpu.get_pipeline_model_parallel_group())
        return torch.exp(-total / self.num_layers)


def _device() -> torch.device:
    """Where this rank's collectives run. `cpu_shim` makes megatron's own question answer the CPU."""
    return torch.device(torch.cuda.current_device())
