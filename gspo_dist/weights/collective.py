"""The collective transport: each bucket is one broadcast from the learner's exporter to every engine worker.

One implementation for nccl (GPU to GPU) and gloo (between hosts without GPUs). A whole bucket goes in one
call, because the 18,000 expert tensors of a 30B model one by one would pay for 18,000 launches.

An engine gives a bucket up first (`seconds` of its update info), then the exporter gives up on the engines,
and last the trainer on the learner. So the side that failed is the one that is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import Checksum, device_checksum, host_checksum
from gspo_dist.weights.group import Broadcast, Group, Meeting, MissingRanks, TransferFailed, join, open_store
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.transport import Staged

BACKENDS = ("nccl", "gloo")
CHECKSUMS: dict[str, Checksum] = {"nccl": device_checksum, "gloo": host_checksum}
"""Backend -> the checksum of both sides, by where its buffers lie."""


@dataclass
class Flight:
    """A bucket's buffer, and its broadcast once that has started."""

    buffer: torch.Tensor
    """uint8, of the group's device."""
    broadcast: Broadcast | None = None


class CollectiveTransport:
    """Implements `Transport`. Making one opens the port at which the engines meet; `close` gives it back."""

    def __init__(
        self,
        backend: str,
        *,
        address: str,
        engines: Sequence[str],
        engine_workers: int = 1,
        check: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        """backend: nccl or gloo. address: the learner's host, as the engines reach it. engines: their names.

        engine_workers: processes per engine (its tensor_parallel). check: compute checksums. timeout_s: of
        the meeting. ValueError: there is nothing to connect, or this host cannot use the backend.
        """
        if backend not in BACKENDS:
            raise ValueError(f"a collective transport is one of {BACKENDS}: got {backend!r}")
        if not address or not engines or engine_workers < 1:
            raise ValueError(
                f"the {backend} transport needs the learner's address and engines of at least one worker: "
                f"got {address!r}, {len(engines)} engines of {engine_workers}"
            )
        if backend == "nccl" and not torch.cuda.is_available():
            raise ValueError(
                "the nccl transport needs a GPU on the learner: set rollout.weight_sync.transport=gloo"
            )
        self.name = backend
        self.engines, self.engine_workers = tuple(engines), engine_workers
        self.check = check
        self.store: Any = open_store(address, timeout_s)
        self.meeting = Meeting(backend, address, self.store.port, self.world_size, timeout_s)
        self.group: Group | None = None

    @property
    def world_size(self) -> int:
        """The learner's exporter and every engine worker."""
        return 1 + len(self.engines) * self.engine_workers

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """The meeting, and the rank at which the engine's first worker joins.

        Example: 3 engines of 2 workers each make a group of 7; the engines begin at the ranks 1, 3 and 5.
        """
        if not 0 <= engine_index < len(self.engines):
            raise ValueError(f"engine index must be in 0..{len(self.engines) - 1}: got {engine_index}")
        return {
            "transport": self.name,
            "check": self.check,
            "meeting": asdict(self.meeting),
            "first_rank": 1 + engine_index * self.engine_workers,
        }

    def connect(self) -> None:
        """Joins as rank 0. Returns once every engine has joined, which they do in `init_weight_sync`."""
        try:
            self.group = join(self.meeting, 0, self.store)
        except MissingRanks as missing:
            names = dict.fromkeys(self.engines[(rank - 1) // self.engine_workers] for rank in missing.ranks)
            raise TransferFailed(
                f"{', '.join(names)} did not come to the rendezvous of the weight sync at "
                f"{self.meeting.address}:{self.meeting.port} within {self.meeting.timeout_s:.0f} s; check "
                "that its host reaches this one on any port"
            ) from None

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged:
        """Packs one bucket where the group sends from, and sums what lies there: a bad copy shows too."""
        layout = BucketLayout.of(bucket)
        flat = torch.empty(max(layout.nbytes, 1), dtype=torch.uint8, device=self._connected().device)
        layout.fill(flat, bucket)
        start = time.perf_counter()
        checksum = CHECKSUMS[self.name]
        checksums = {n: checksum(t) for n, t in layout.views(flat)} if self.check else {}
        seconds = time.perf_counter() - start
        nbytes = sum(t.nbytes for _, t in bucket)
        return Staged({"layout": layout.to_dict()}, checksums, nbytes, seconds, Flight(flat))

    def send(self, staged: Staged) -> None:
        """Starts the broadcast. It completes when the engines, told by `deliver`, have entered theirs."""
        staged.handle.broadcast = self._connected().broadcast(staged.handle.buffer)

    def release(self, staged: Staged) -> None:
        """Nothing to do: a broadcast holds its buffer until it has read it."""

    def close(self) -> None:
        """Leaves the group and gives the port back, whatever became of the others. May be called again."""
        group, self.group, self.store = self.group, None, None
        if group is not None:
            group.close()

    def _connected(self) -> Group:
        if self.group is None:
            raise ValueError(
                f"the {self.name} transport is not connected: call connect() while the engines run "
                "init_weight_sync"
            )
        return self.group


class CollectiveSource:
    """The engine worker's side: joins the group, then takes one bucket after the other."""

    arrives_later = True

    def __init__(self, init_info: Mapping[str, Any], worker: int = 0) -> None:
        """init_info: of `CollectiveTransport.init_info`. worker: this process among those of its engine.

        TransferFailed: the others were not met.
        """
        self.meeting = Meeting(**init_info["meeting"])
        self.checksum = CHECKSUMS[self.meeting.backend]
        self.group: Group | None = join(self.meeting, init_info["first_rank"] + worker)

    def begin(self, update_info: Mapping[str, Any]) -> Callable[[], list[NamedTensor]]:
        """Enters the next broadcast. TransferFailed: it did not arrive within the update info's `seconds`."""
        if self.group is None:
            raise TransferFailed("the weight sync of this engine was closed: connect again")
        layout = BucketLayout.from_dict(update_info["layout"])
        flat = torch.empty(max(layout.nbytes, 1), dtype=torch.uint8, device=self.group.device)
        broadcast = self.group.broadcast(flat)
        seconds = update_info.get("seconds") or self.meeting.timeout_s

        def arrived() -> list[NamedTensor]:
            broadcast.wait(seconds)
            return list(layout.views(flat))

        return arrived

    def close(self) -> None:
        """Leaves the group. A second call does nothing."""
        group, self.group = self.group, None
        if group is not None:
            group.close()
