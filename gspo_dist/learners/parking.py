"""A learner's memory on its device, moved to the host and back, bit for bit, while colocated engines sample.

What moves is storage, not tensors: a storage is copied, then made empty, and later made whole again and
filled. Every view keeps its place, so gradient buffers, flat partitions and the parameters cut out of them
need no care, and nothing of a backend has to know that it slept. A storage of zeros, as gradients are between
two steps, is not copied. Host buffers are pinned on GPU hosts and used again.

    awake        everything is on the device        log-probs, updates, checkpoints
    weights      the weights alone are              publications, exports, log-probs
    asleep       nothing is                         engines sample
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

OWNERS = ("gspo_dist", "torch", "deepspeed", "megatron", "transformers", "transformer_engine")
"""Packages into whose objects the search for tensors goes."""


@dataclass(frozen=True)
class Held:
    """What a learner keeps between two verbs."""

    device: torch.device
    """Where it computes. What it keeps elsewhere (offloaded states) stays there."""
    weights: Sequence[Tensor]
    """What a publication and log-probs need."""
    others: Sequence[object]
    """Objects below which everything else is found: masters, moments, gradients, a reference. Weights may be
    among it."""


class Holds(Protocol):
    """The part of a learner that can be put to sleep."""

    def held(self) -> Held: ...


@dataclass(frozen=True)
class _Parked:
    storage: torch.UntypedStorage
    nbytes: int
    host: Tensor | None
    """Its bytes. None stands for zeros."""
    weight: bool


class Parking:
    """One learner, and what of it is in host memory."""

    def __init__(self, learner: Holds) -> None:
        self.learner = learner
        self._parked: dict[int, _Parked] = {}
        self._buffers: dict[int, Tensor] = {}

    def sleep(self, *, keep_weights: bool = False) -> int:
        """Moves what is on the device to host memory, all or all but the weights. Returns the bytes freed.

        May be called again: it does nothing to what sleeps already.
        """
        if any(parked.weight for parked in self._parked.values()):
            return 0  # all of it sleeps
        held = self.learner.held()
        weights = _storages(held.weights, held.device)
        others = _storages(tensors_below(held.others), held.device)
        found = {key: (storage, False) for key, storage in others.items() if key not in weights}
        if not keep_weights:
            found |= {key: (storage, True) for key, storage in weights.items()}
        known = self._parked.keys() | others.keys() | weights.keys()
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in known}
        _finish(held.device)  # a backend's side streams may still write
        moved = {key: self._copy_out(key, storage, weight) for key, (storage, weight) in found.items()}
        _finish(held.device)  # copies out of pinned memory are still under way
        for parked in moved.values():
            parked.storage.resize_(0)
        self._parked |= moved
        if held.device.type == "cuda":
            torch.cuda.empty_cache()  # to the engine, which has an allocator of its own
        return sum(parked.nbytes for parked in moved.values())

    def wake_up(self, *, weights_only: bool = False) -> int:
        """Moves it back, all or the weights alone. Returns the bytes that are on the device again.

        May be called again. Raises what torch raises where the device has no room.
        """
        moved = {key: p for key, p in self._parked.items() if p.weight or not weights_only}
        for parked in moved.values():
            parked.storage.resize_(parked.nbytes)
            flat = _flat(parked.storage)
            flat.zero_() if parked.host is None else flat.copy_(parked.host, non_blocking=True)
        if moved:
            _finish(next(iter(moved.values())).storage.device)
        self._parked = {key: p for key, p in self._parked.items() if key not in moved}
        return sum(parked.nbytes for parked in moved.values())

    def require(self, *, states: bool = True) -> None:
        """RuntimeError where a verb's memory sleeps. states: whether it needs more than the weights."""
        if any(states or parked.weight for parked in self._parked.values()):
            what = "states" if states else "weights"
            raise RuntimeError(f"the learner's {what} are in host memory: wake it up before it computes")

    def _copy_out(self, key: int, storage: torch.UntypedStorage, weight: bool) -> _Parked:
        flat, host = _flat(storage), None
        if bool(flat.any()):
            host = self._buffers.get(key)
            if host is None or len(host) != len(flat):
                host = torch.empty(len(flat), dtype=torch.uint8, pin_memory=flat.is_cuda)
                self._buffers[key] = host
            host.copy_(flat, non_blocking=True)
        return _Parked(storage, len(flat), host, weight)


def tensors_below(roots: Iterable[object]) -> Iterator[Tensor]:
    """Every tensor that is reached from `roots` through containers and the attributes of `OWNERS`' objects.

    Gradients and what a backend hangs on a parameter (main_grad, ds_tensor) are reached from it. Of a module
    parameters and buffers count: what else it keeps (a dispatcher's indices) is small, and its forward pass
    needs it while only the weights are awake.
    """
    todo: list[Any] = list(roots)
    seen: dict[int, object] = {}  # keeps what it counted alive, so that no id is given twice
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            yield one
            if one.is_leaf and one.grad is not None:
                todo.append(one.grad)
            todo += vars(one).values()
        elif isinstance(one, torch.nn.Module):
            todo += one.parameters()
            todo += torch.nn.Module.buffers(one)  # Megatron's DDP has a list of that name
        elif isinstance(one, Mapping):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            todo += one
        elif not isinstance(one, type) and type(one).__module__.partition(".")[0] in OWNERS:
            todo += getattr(one, "__dict__", {}).values()


def _storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Their storages on the device, each once.

    Without those that are empty, and those that torch cannot resize: on a CPU a mapped file, what torch.load
    read, and what numpy has looked at.
    """
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                found[storage._cdata] = storage
    return found


def _flat(storage: torch.UntypedStorage) -> Tensor:
    """A storage as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
