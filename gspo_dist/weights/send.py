"""Sending weights: the next bucket is staged while the engines load the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gspo_dist.weights.collective import BACKENDS, CollectiveTransport
from gspo_dist.weights.shm import ShmTransport
from gspo_dist.weights.stacks import member_shapes
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.transport import Staged, Transport
from gspo_dist.weights.verify import WeightSyncError


@dataclass(frozen=True)
class SentReport:
    """What one publication sent."""

    checksums: dict[str, int]
    """Checksum of every tensor that travelled, by name. Empty when checks are off."""
    tensors: int
    """Number of the folder's tensors that they stand for."""
    bytes: int
    """Bytes of all tensors."""
    seconds_checking: float
    """Seconds that the checksums took."""


def send_weights(
    weights: Iterable[Sequence[NamedTensor]],
    transport: Transport,
    deliver: Callable[[dict[str, Any]], object],
) -> SentReport:
    """Sends every bucket of `weights`; runs on the learner's exporter rank, once for each publication.

    `deliver(update_info)` has all engines take one bucket (`RolloutEngine.update_weights`) and returns
    when all have. It owns the timeout. While it waits, the next bucket is gathered and staged, so at most
    two are alive.

    Raises WeightSyncError for a tensor that is sent twice, and whatever `weights`, `transport` or `deliver`
    raise. Whatever fails, nothing staged is left behind. The engines then hold a part of the update and must
    not be used.
    """
    checksums: dict[str, int] = {}
    seen: set[str] = set()
    total_bytes, checking = 0, 0.0
    flying: tuple[Staged, Future[object]] | None = None
    executor = ThreadPoolExecutor(1, thread_name_prefix="weight-delivery")
    alive: list[Staged] = []
    try:
        for bucket in weights:
            staged = transport.stage(bucket)
            alive.append(staged)
            for stack, tensor in bucket:
                for name, _ in member_shapes(stack, tensor.shape):
                    if name in seen:
                        raise WeightSyncError(f"the learner exported {name} twice in one publication")
                    seen.add(name)
            checksums.update(staged.checksums)
            total_bytes += staged.nbytes
            checking += staged.seconds_checking
            if flying is not None:
                flying[1].result()
                transport.release(flying[0])
                alive.pop(0)
            # The engines are told first: a broadcast returns only when they have entered it.
            flying = (staged, executor.submit(deliver, staged.update_info))
            transport.send(staged)
        if flying is not None:
            flying[1].result()
    finally:
        # Without waiting: a delivery that hangs has a timeout of its own, and the error at hand must
        # get out first.
        executor.shutdown(wait=False)
        for staged in alive:
            transport.release(staged)
    return SentReport(checksums, len(seen), total_bytes, checking)


def make_transport(name: str, *, check: bool = True, **where: Any) -> Transport:
    """The transport by its name: shm (no further arguments), nccl or gloo (those of `CollectiveTransport`).

    ValueError: another name, or arguments that the transport does not take.
    """
    if name == "shm":
        if where:
            raise ValueError(f"the shm transport takes no {sorted(where)}")
        return ShmTransport(check=check)
    if name in BACKENDS:
        return CollectiveTransport(name, check=check, **where)
    raise ValueError(f"rollout.weight_sync.transport must be shm, gloo or nccl once resolved: got {name!r}")
