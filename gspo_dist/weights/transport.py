"""How the bytes of a bucket travel, as protocols: `Transport` is the sender's side, `Source` an engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_dist.weights.checksum import Checksum
from gspo_dist.weights.stream import NamedTensor


@dataclass(frozen=True)
class Staged:
    """A bucket that is ready to be delivered."""

    update_info: dict[str, Any]
    """What the engines are told: where the bytes are and how they are laid out. Plain data."""
    checksums: dict[str, int]
    """Checksum of every tensor, by name. Empty when checks are off."""
    nbytes: int
    """Bytes of the tensors, without the gaps between them."""
    seconds_checking: float
    """Seconds that the checksums took."""
    handle: Any = None
    """What `release` gives back: the file's path (shm), or the buffer and its broadcast (nccl, gloo)."""


class Transport(Protocol):
    """How the bytes of a bucket travel. Every bucket is staged, sent, delivered (the engines are
    told) and released.
    """

    @property
    def name(self) -> str:
        """shm, gloo or nccl."""
        ...

    def init_info(self, engine_index: int) -> Mapping[str, Any]:
        """The argument of `init_weight_sync` of engine `engine_index` (0, 1, ...), as plain data.

        Changes nothing, so it may be called again. ValueError: there is no such engine.
        """
        ...

    def connect(self) -> None:
        """Meets the engines. It is called once, while they run `init_weight_sync`, and returns when
        all have come.

        WeightSyncError: the library that it needs is not there, or an engine did not come, with its name.
        """
        ...

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged:
        """Copies a bucket to where it can be sent from; the caller may change its tensors afterwards.

        Called once for each bucket. ValueError: there is no room. When it raises, nothing is left behind.
        """
        ...

    def send(self, staged: Staged) -> None:
        """Starts what must run beside the engines' receive. It must not wait for them. Called once
        for each bucket.

        ValueError: not connected.
        """
        ...

    def release(self, staged: Staged) -> None:
        """Gives the bucket's memory back once the engines have answered, or have failed. A second
        call does nothing.
        """
        ...

    def close(self) -> None:
        """Leaves the engines and removes what an interrupted transfer left. A second call does nothing."""
        ...


class Source(Protocol):
    """Where an engine worker takes buckets from; made by `make_source` of what `Transport.init_info` said."""

    @property
    def checksum(self) -> Checksum:
        """The one that the sender uses."""
        ...

    @property
    def arrives_later(self) -> bool:
        """Whether a bucket takes its time after `begin`, so that the one before may be loaded meanwhile."""
        ...

    def begin(self, update_info: Mapping[str, Any]) -> Callable[[], list[NamedTensor]]:
        """Starts to take the bucket that `Staged.update_info` describes; the result, called, waits for it.

        Each bucket once, in order. ValueError or WeightSyncError, from either: it is not there, or did
        not arrive in time.
        """
        ...

    def close(self) -> None:
        """Leaves the sender. A second call does nothing."""
        ...
