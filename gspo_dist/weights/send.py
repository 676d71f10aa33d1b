"""Sending weights: stages the learner's next bucket while the engines load the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_dist.weights.nccl import NcclTransport
from gspo_dist.weights.shm import ShmTransport, Staged
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.verify import WeightSyncError


class Transport(Protocol):
    """How a bucket's bytes travel. A bucket is staged, delivered (the engines are told, and answer),
    released.
    """

    name: str

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """The argument of engine `engine_index`'s `init_weight_sync`."""
        ...

    def connect(self) -> None:
        """Meets the engines; called while they run `init_weight_sync`."""
        ...

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged: ...

    def send(self, staged: Staged) -> None:
        """Starts what must run beside the engines' receive; must not wait for them."""
        ...

    def release(self, staged: Staged) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SentReport:
    """What one publication sent: checksum of every tensor (empty when checks are off), counts, and the seconds that
    checking took.
    """

    checksums: dict[str, int]
    tensors: int
    bytes: int
    seconds_checking: float


def send_weights(
    weights: Iterable[Sequence[NamedTensor]], transport: Transport, deliver: Callable[[dict[str, Any]], None]
) -> SentReport:
    """Sends every bucket; runs on the learner's exporter rank.

    `deliver(update_info)` has all engines take one bucket (`RolloutEngine.update_weights`) and returns when
    all have; it owns the timeout. While it waits, the next bucket is gathered and staged: at most two are
    alive. Whatever fails, nothing staged is left behind. Raises `WeightSyncError` for a tensor sent twice and
    whatever `deliver` does.
    """
    checksums: dict[str, int] = {}
    seen: set[str] = set()
    total_bytes, checking = 0, 0.0
    flying: tuple[Staged, Future[None]] | None = None
    executor = ThreadPoolExecutor(1, thread_name_prefix="weight-delivery")
    alive: list[Staged] = []
    try:
        for bucket in weights:
            staged = transport.stage(bucket)
            alive.append(staged)
            for name, _ in bucket:
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
            flying = (staged, executor.submit(deliver, staged.update_info))
            transport.send(staged)
        if flying is not None:
            flying[1].result()
    finally:
        # Without waiting: a delivery that hangs has its own timeout, and the error at hand must get out
        # first.
        executor.shutdown(wait=False)
        for staged in alive:
            transport.release(staged)
    return SentReport(checksums, len(seen), total_bytes, checking)


def make_transport(name: str, *, check: bool = True, **where: Any) -> Transport:
    """shm (no further arguments) or nccl (master_address, master_port, engines, engine_workers)."""
    if name == "shm":
        if where:
            raise ValueError(f"the shm transport takes no {sorted(where)}")
        return ShmTransport(check=check)
    if name == "nccl":
        return NcclTransport(check=check, **where)
    raise ValueError(f"rollout.weight_sync.transport must be shm or nccl once resolved: got {name!r}")
