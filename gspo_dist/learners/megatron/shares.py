"""The optimiser states that a rank holds, as pieces of whole tensors: it writes and reads what it holds.

megatron-core's distributed optimiser gives each data-parallel rank a range of every flattened parameter. Its
format for any layout (0.16.1, fully_reshardable) gathers whole tensors on every rank first, which takes up to
30 bytes of host memory per parameter. A range of a flattened tensor is a few boxes of the tensor, and the
file format takes boxes. So no rank gathers anything.

Names and whole shapes are those of fully_reshardable, so either reads what the other wrote.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, HybridDeviceOptimizer

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter, under megatron-core's names: its fp32 master and its two moments."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes in a tensor."""


@dataclass(frozen=True)
class Held:
    """The states of a parameter's range on this rank, into which a load reads."""

    parameter: torch.nn.Parameter
    """The parameter of the model."""
    flat: dict[str, torch.Tensor]
    """State -> its range [n], float32."""


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """The elements start to end - 1 of a flattened tensor as boxes of it, in their order.

    Example: 3 to 9 of shape (4, 5) are the end of row 0, [0:1, 3:5], and row 1, [1:2, 0:5].
    """
    if start >= end:
        return []
    if len(shape) <= 1:
        return [((start,), (end - start,))] if shape else [((), ())]
    inner = math.prod(shape[1:])
    first, last = start // inner, (end - 1) // inner
    if first == last and end - start < inner:
        return _in_row(shape, first, start - first * inner, end - first * inner)
    whole = -(-start // inner), end // inner
    found = _in_row(shape, first, start % inner, inner) if start % inner else []
    if whole[1] > whole[0]:
        found.append(((whole[0], *(0,) * (len(shape) - 1)), (whole[1] - whole[0], *shape[1:])))
    return found + (_in_row(shape, last, 0, end % inner) if end % inner else [])


def _in_row(shape: tuple[int, ...], row: int, start: int, end: int) -> list[Box]:
    """The boxes of a range of one row."""
    return [((row, *offset), (1, *sizes)) for offset, sizes in boxes(shape[1:], start, end)]


def parts(sharded: ShardedTensor | ShardedTensorFactory, key: str) -> list[tuple[int, ShardedTensor]]:
    """Where a parameter's flattened elements have their global place: (first element, tensor without data).

    A factory cuts the parameter into several tensors (gate and up projections of one matrix). It is asked
    with a tensor without memory: the views that it makes say where in the parameter they lie.
    """
    if isinstance(sharded, ShardedTensor):
        return [(0, replace(sharded, key=key, data=None, dtype=torch.float32))]
    blank = torch.empty(sharded.data.shape, dtype=torch.float32, device="meta")
    built = [t for t in nested_values(replace(sharded, key=key, data=blank).build()) if t.local_shape]
    for tensor in built:
        if not tensor.data.is_contiguous():
            raise NotImplementedError(
                f"{key} is cut into pieces that are not contiguous: {tensor.local_shape}"
            )
    return sorted(((t.data.storage_offset(), t.without_data()) for t in built), key=lambda part: part[0])


def pieces(
    sharded: ShardedTensor | ShardedTensorFactory, key: str, flat: torch.Tensor, start: int
) -> dict[int, ShardedTensor]:
    """`flat`, the elements from `start` on of a flattened parameter, as tensors with a global place.

    Their data are views of `flat`. The prepended axes of an expert become real ones of size 1, because boxes
    of unequal sizes have no others (0.16.1).
    """
    found: dict[int, ShardedTensor] = {}
    end = start + flat.numel()
    for first, tensor in parts(sharded, key):
        size = math.prod(tensor.local_shape)
        low, high = max(start, first), min(end, first + size)
        at = low - start
        for offset, sizes in boxes(tuple(tensor.local_shape), low - first, high - first):
            ahead = tensor.prepend_axis_num
            local = (1,) * ahead + sizes
            count = math.prod(sizes)
            inside = (0,) * ahead + offset
            found[len(found)] = replace(
                tensor,
                data=flat[at : at + count].view(local),
                local_shape=local,
                global_offset=tuple(a + b for a, b in zip(tensor.global_offset, inside, strict=True)),
                axis_fragmentations=None,
                prepend_axis_num=0,
            )
            at += count
    return found


def _ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """The parameters of which this rank holds something, with the first element that it holds."""
    for buffers in part.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


@contextlib.contextmanager
def instead_of_gathering(optimizer: Any) -> Iterator[dict[int, list[Held]]]:
    """While it is open, the distributed optimisers of a chain answer with pieces where they would gather.

    Yields what they held, by their place in the chain: filled when they are asked.
    """
    held: dict[int, list[Held]] = {}
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    changed = [(i, part) for i, part in enumerate(chain) if isinstance(part, DistributedOptimizer)]

    def asked(i: int, part: DistributedOptimizer) -> Any:
        def answer(model_state: Any, is_loading: bool = False, metadata: Any = None) -> dict[int, Any]:
            own = held[i] = list[Held]()
            return _states(part, model_state, own, loading=is_loading)

        return answer

    try:
        for i, part in changed:
            part.sharded_param_state_fully_reshardable = asked(i, part)
        yield held
    finally:
        for _, part in changed:
            part.__dict__.pop("sharded_param_state_fully_reshardable", None)


def _states(
    part: DistributedOptimizer, model_state: Any, held: list[Held], *, loading: bool
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """The pieces of every state that `part` holds on this rank; adds the tensors that they view to `held`."""
    places = {
        id(value.data): value
        for value in nested_values(model_state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    states: dict[int, dict[str, dict[int, ShardedTensor]]] = {}
    for parameter, start in _ranges(part):
        sharded = places[id(parameter)]
        # A rank's range is held once. What twins over tensor ranks or stages hold of it is the same.
        own = replace(sharded, replica_id=(*sharded.replica_id[:2], part.distributed_optimizer_instance_id))
        tensors = part._get_main_param_and_optimizer_states(parameter)
        flat = {state: tensors[state].detach().float().flatten() for state in STATES}
        if not loading:
            # The writer is a fork, which does not inherit pinned pages.
            flat = {state: t.clone() if t.is_pinned() else t for state, t in flat.items()}
        held.append(Held(parameter, flat))
        states[len(states)] = {
            state: pieces(own, f"optimizer.state.{state}.{sharded.key}", t, start)
            for state, t in flat.items()
        }
    return states


def restore(part: DistributedOptimizer, held: list[Held]) -> None:
    """Gives an optimiser the states that were read. Where they were read in place it changes nothing."""
    for one in held:
        part._set_main_param_and_optimizer_states(one.parameter, one.flat)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()
