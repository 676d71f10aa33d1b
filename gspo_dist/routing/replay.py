"""Routing Replay for any backend: hands each router its recorded experts once per pass, and records them.

An adapter hooks into its routers and does nothing else. On entry it builds a `RouteFeeder` or a
`RouteRecorder`. In each router's forward it calls `feeder.layers[i].choose(native_ids)` and gathers the gate
weights of the chosen experts from the current logits. It runs the model inside `with feeding(feeder): ...`.

Only the choice is replayed, so the router keeps its gradient: the mask comes from the recording and the
softmax from the current logits (arXiv 2510.11370, section 3).

Letters: T tokens of a micro-batch, L MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from gspo_dist.routing.trace import RoutingTrace, id_dtype


class RoutingReplayError(RuntimeError):
    """A router did not use each route exactly once per pass: the result would be of another network."""


def in_backward() -> bool:
    """True while autograd runs: a router called now is being recomputed from an activation checkpoint.

    This holds for both kinds of checkpoint of torch and for Megatron's.
    """
    # Private, but torch's own checkpoint asks the same question in the same way.
    return torch._C._current_graph_task_id() != -1


def merge_known(native_ids: torch.Tensor, target_ids: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """[T, K], [T, K], [T] bool -> [T, K]: recorded experts where known, the router's own elsewhere."""
    return torch.where(known[:, None], target_ids, native_ids)


@dataclass(frozen=True)
class RouterShape:
    """The routers of one model, or of one rank's part of it."""

    names: tuple[str, ...]
    """A name per router, in the order of the trace's layers."""
    top_k: int
    """Experts per token, K."""
    num_experts: int
    """Experts per layer."""


def check_trace(trace: RoutingTrace, shape: RouterShape, *, tokens: int | None = None) -> None:
    """Refuses a trace that `shape`'s routers cannot replay.

    It may be another model's, truncated, or hold rows that no router could choose.

    tokens: the rows that the model will compute, where the caller knows it.

    Raises ValueError naming layer and token.
    """
    got = (trace.num_layers, trace.top_k, trace.num_experts)
    need = (len(shape.names), shape.top_k, shape.num_experts)
    if got != need:
        raise ValueError(
            f"routing trace must fit the model: got (moe_layers, top_k, num_experts) = {got} for a model of "
            f"{need}; it was recorded from another model"
        )
    if tokens is not None and len(trace) != tokens:
        raise ValueError(
            f"routing trace must have one row per token: got {len(trace)} rows for {tokens} tokens (first "
            f"router {shape.names[0]}, token {min(len(trace), tokens)}); mark unrecorded rows unknown "
            "instead of cutting them"
        )
    known = trace.expert_ids if trace.known.all() else trace.expert_ids[trace.known]
    if known.size and int(known.max()) >= shape.num_experts:
        _refuse(
            trace, trace.expert_ids >= shape.num_experts, shape, f"lie below num_experts {shape.num_experts}"
        )
    # Compared as K long rows: 20 times faster than as many runs of K.
    columns = np.ascontiguousarray(known.reshape(-1, shape.top_k).T)
    for i in range(shape.top_k):
        for j in range(i):
            if (columns[i] == columns[j]).any():
                _refuse(trace, trace.expert_ids == np.roll(trace.expert_ids, i - j, -1), shape, "be distinct")


def _refuse(trace: RoutingTrace, bad: np.ndarray, shape: RouterShape, rule: str) -> None:
    """Raises ValueError for the first known row with a mark in `bad` [T, L, K] bool."""
    token, layer = (int(i) for i in np.argwhere(bad.any(-1) & trace.known[:, None])[0])
    raise ValueError(
        f"expert ids of a row must {rule}: got {trace.expert_ids[token, layer].tolist()} at router "
        f"{shape.names[layer]} (MoE layer {layer}), token {token}; the recording is broken or misaligned"
    )


class LayerReplay:
    """One router's routes of the micro-batches of a pass, in the order in which the pass runs them.

    Forward and recomputed forward advance separately. Under a pipeline schedule the forward of micro-batch m
    + 1 precedes the backward of m, and so its recomputation.

    Example: two micro-batches run as forward 0, forward 1, backward 0, backward 1. `choose` gives the routes
    of micro-batches 0, 1, 0, 1.
    """

    def __init__(
        self, name: str, routes: Sequence[tuple[torch.Tensor, torch.Tensor | None]], recompute: bool
    ) -> None:
        """
        routes: per micro-batch, ids [T, K] in the trace's small type and known [T] bool, on the router's
            device; known is None where every row is.
        recompute: whether the backward runs this router's forward again.
        """
        self.name = name
        self.recompute = recompute
        self.routes = list(routes)
        self.forwards = 0
        self.recomputes = 0

    @torch.compiler.disable
    def choose(self, native_ids: torch.Tensor) -> torch.Tensor:
        """The experts to use now, [T, K] in the type of `native_ids`.

        native_ids: the router's own choice [T, K], which unknown rows keep.

        Raises RoutingReplayError for more forwards than routes, and ValueError for another number of rows.
        """
        again = in_backward()
        at = self.recomputes if again else self.forwards
        self.recomputes += again
        self.forwards += not again
        if at >= len(self.routes):
            raise RoutingReplayError(
                f"router {self.name} asked for route {at + 1} of {len(self.routes)} in its "
                f"{'recomputed ' if again else ''}forward: run each micro-batch once in a replay block"
            )
        ids, known = self.routes[at]
        if len(ids) != len(native_ids):
            raise ValueError(
                f"routing trace of router {self.name} must have one row per token: got {len(ids)} rows for "
                f"{len(native_ids)} tokens, micro-batch {at}, token {min(len(ids), len(native_ids))}"
            )
        target = _widen(ids.to(native_ids.device), native_ids.dtype)
        return target if known is None else merge_known(native_ids, target, known.to(native_ids.device))

    def unused(self) -> str | None:
        """What is wrong with the counts, or None when every route was used as often as it must be.

        That is once in the forward, and once more in the recomputed forward where there is one.
        """
        need = len(self.routes)
        recomputes = need if self.recompute else 0
        if (self.forwards, self.recomputes) == (need, recomputes):
            return None
        return (
            f"router {self.name} used {self.forwards} of {need} routes in the forward and {self.recomputes} "
            f"of {recomputes} in the recomputed forward"
        )


def _narrow(ids: np.ndarray, device: torch.device) -> torch.Tensor:
    """To the device in one or two bytes per id. uint16 travels as the bits of int16."""
    array = ids.copy()  # arrays from an object store are read-only, which torch refuses
    # torch 2.13 has few uint16 kernels: indexing and where() lack one.
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array).to(
        device, non_blocking=True
    )


def _widen(ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Back to the ids' values: -1 as int16 is expert 65535."""
    return ids.to(dtype) if ids.dtype == torch.uint8 else ids.to(dtype) & 0xFFFF


class RouteFeeder:
    """The recorded routes of one pass, dealt to this rank's routers and counted."""

    def __init__(
        self,
        traces: Sequence[RoutingTrace],
        shape: RouterShape,
        device: torch.device | str,
        *,
        columns: Sequence[int] | None = None,
        recompute: bool | Sequence[bool] = False,
        tokens: Sequence[int | None] | None = None,
    ) -> None:
        """
        traces: one per micro-batch, already cut to the rows that this rank's routers see. Context and
            sequence parallel ranks slice with `trace[rows]`; padding rows are unknown.
        shape: the routers of this rank.
        columns: which MoE layers of the trace they are, because a pipeline stage has some
        of them. Default: all.
        recompute: whether the backward runs the routers' forward again, for all of them or one by one. It
            must be False under `torch.no_grad()`.
        tokens: rows that each micro-batch will compute, where known, to refuse a truncated
            trace before anything runs.

        Raises ValueError for a trace that does not fit.
        """
        if columns is not None:
            traces = [trace.layers(columns) for trace in traces]
        for trace, rows in zip(traces, tokens or [None] * len(traces), strict=True):
            check_trace(trace, shape, tokens=rows)
        if not isinstance(recompute, bool) and len(recompute) != len(shape.names):
            raise ValueError(
                f"recompute must have one entry per router: got {len(recompute)} for {len(shape.names)}"
            )
        again = [recompute] * len(shape.names) if isinstance(recompute, bool) else list(recompute)
        device = torch.device(device)
        ids = [_narrow(trace.expert_ids, device) for trace in traces]
        # Without unknown rows nothing must be merged, and nothing is moved to the device for it.
        known = [
            None if trace.known.all() else torch.from_numpy(trace.known.copy()).to(device, non_blocking=True)
            for trace in traces
        ]
        self.layers = [
            LayerReplay(
                name, [(micro[:, layer], mask) for micro, mask in zip(ids, known, strict=True)], again[layer]
            )
            for layer, name in enumerate(shape.names)
        ]
        self.rows = sum(len(trace) for trace in traces)
        """Tokens of the pass on this rank."""
        self.native_rows = sum(trace.unknown_rows for trace in traces)
        """Tokens among them without a recording, which are routed natively in every layer."""
        self.nbytes = sum(t.nbytes for t in (*ids, *(mask for mask in known if mask is not None)))
        """Bytes moved to the device and held there during the pass."""

    def finish(self) -> None:
        """Raises RoutingReplayError unless each route was used exactly once per pass.

        The message names the first router at fault and counts the others. May be called again.
        """
        wrong = [message for layer in self.layers if (message := layer.unused())]
        if wrong:
            more = f" (and {len(wrong) - 1} more routers)" if len(wrong) > 1 else ""
            raise RoutingReplayError(
                f"{wrong[0]}{more}: keep the whole forward, and the backward where activations are "
                "recomputed, inside the replay block; a router that a fused or compiled kernel bypasses "
                "cannot be replayed"
            )


@contextmanager
def feeding(feeder: RouteFeeder) -> Iterator[RouteFeeder]:
    """Checks the counts when the block ends well. An exception inside passes through unchanged."""
    yield feeder
    feeder.finish()


class RouteRecorder:
    """Collects the experts that this rank's routers used, one forward per micro-batch.

    Recomputed forwards are ignored. Ids are kept on the device in their smallest type until `trace()`: K
    bytes per token and layer up to 256 experts, else 2 K.
    """

    def __init__(self, shape: RouterShape) -> None:
        self.shape = shape
        self._small = torch.uint8 if id_dtype(shape.num_experts) == np.uint8 else torch.int16
        self._seen: list[list[torch.Tensor]] = [[] for _ in shape.names]

    @torch.compiler.disable
    def see(self, layer: int, ids: torch.Tensor) -> None:
        """Notes what router `layer` uses in this forward: ids [T, K]. Called once per router and forward."""
        if not in_backward():
            # int64 to int16 wraps, which keeps the bits of uint16.
            self._seen[layer].append(ids.detach().to(self._small))

    @property
    def nbytes(self) -> int:
        """Bytes held on the device by what was recorded so far."""
        return sum(ids.nbytes for seen in self._seen for ids in seen)

    def traces(self) -> list[RoutingTrace]:
        """One trace per micro-batch, in the order of the forwards.

        Raises RoutingReplayError when the routers did not all see the same number of forwards.
        May be called again.
        """
        counts = [len(seen) for seen in self._seen]
        if len(set(counts)) != 1:
            least = counts.index(min(counts))
            raise RoutingReplayError(
                f"every router must record each forward once: router {self.shape.names[least]} saw "
                f"{counts[least]} and router {self.shape.names[counts.index(max(counts))]} saw {max(counts)}"
            )
        out = []
        for micro in zip(*self._seen, strict=True):
            ids = torch.stack(micro, dim=1).cpu().numpy()
            ids = ids.view(np.uint16) if ids.dtype == np.int16 else ids
            out.append(RoutingTrace(ids, np.ones(len(ids), np.bool_), self.shape.num_experts))
        return out

    def trace(self) -> RoutingTrace:
        """The experts of the one forward that was recorded. Raises RoutingReplayError for none or several."""
        traces = self.traces()
        if len(traces) != 1:
            raise RoutingReplayError(
                f"a recording of one forward was asked for: the routers saw {len(traces)}"
            )
        return traces[0]
