"""The nccl transport: each bucket is one broadcast from the learner's exporter to every engine worker,
GPU to GPU.

It uses the process group of vLLM's NCCL weight transfer: the learner is rank 0, the workers come after
it. A whole bucket goes in one call, because the 18,000 expert tensors of a 30B model one by one would pay
for 18,000 launches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import device_checksum
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.transport import Staged
from gspo_dist.weights.verify import WeightSyncError

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator


def require_nccl(group: Any) -> None:
    """Raises WeightSyncError when `group` found no NCCL.

    vLLM 0.30 only marks such a communicator as `disabled`, and its broadcasts then do nothing.
    """
    if group.disabled:
        raise WeightSyncError(
            "the nccl transport found no NCCL that vLLM can use: unset VLLM_DISABLE_PYNCCL, check "
            "VLLM_NCCL_SO_PATH, or set rollout.weight_sync.transport=shm"
        )


class NcclTransport:
    """Implements `Transport`.

    master_address, master_port: where the group meets, on the learner's host. engines: how many there
    are. engine_workers: GPUs per engine (its tensor_parallel). check: compute checksums. ValueError:
    see the messages.
    """

    name = "nccl"
    device = "cuda"
    """Where buckets are packed."""

    def __init__(
        self,
        *,
        master_address: str,
        master_port: int,
        engines: int,
        engine_workers: int = 1,
        check: bool = True,
    ) -> None:
        if not master_address or not 1 <= master_port <= 65535:
            raise ValueError(
                f"nccl transport needs an address and a free port of the learner's host: "
                f"got {master_address!r} and {master_port}"
            )
        if engines < 1 or engine_workers < 1:
            raise ValueError(
                f"nccl transport needs engines: got {engines} with {engine_workers} workers each"
            )
        self.master_address, self.master_port = master_address, master_port
        self.engines, self.engine_workers = engines, engine_workers
        self.check = check
        self.group: PyNcclCommunicator | None = None
        self.stream: torch.cuda.Stream | None = None

    @property
    def world_size(self) -> int:
        """The learner's exporter and every engine worker."""
        return 1 + self.engines * self.engine_workers

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """The group, and the rank at which the engine's first worker joins.

        Example: 3 engines of 2 workers each make a group of 7; the engines begin at the ranks 1, 3 and 5.
        """
        if not 0 <= engine_index < self.engines:
            raise ValueError(f"engine index must be in 0..{self.engines - 1}: got {engine_index}")
        return {
            "check": self.check,
            "master_address": self.master_address,
            "master_port": self.master_port,
            "rank_offset": 1 + engine_index * self.engine_workers,
            "world_size": self.world_size,
        }

    def connect(self) -> None:
        """Joins the group as rank 0. It returns once every engine has joined, which they
        do in `init_weight_sync`.
        """
        if not torch.cuda.is_available():
            raise ValueError(
                "the nccl transport needs a GPU on the learner: set rollout.weight_sync.transport=shm"
            )
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.group = trainer_init(
            {
                "master_address": self.master_address,
                "master_port": self.master_port,
                "world_size": self.world_size,
            }
        )
        require_nccl(self.group)
        # A stream of its own: staging the next bucket must not queue behind a broadcast whose receivers
        # may be dead.
        self.stream = torch.cuda.Stream()

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged:
        """Packs one bucket on the GPU and sums what lies there, so that a bad copy shows too."""
        layout = BucketLayout.of(bucket)
        flat = torch.empty(max(layout.nbytes, 1), dtype=torch.uint8, device=self.device)
        layout.fill(flat, bucket)
        start = time.perf_counter()
        checksums = {n: device_checksum(t) for n, t in layout.views(flat)} if self.check else {}
        seconds = time.perf_counter() - start
        return Staged(
            {"layout": layout.to_dict()}, checksums, sum(t.nbytes for _, t in bucket), seconds, flat
        )

    def send(self, staged: Staged) -> None:
        """Enqueues the broadcast; it completes when the engines, told by `deliver`, have entered theirs."""
        if self.group is None or self.stream is None:
            raise ValueError(
                "nccl transport is not connected: call connect() while the engines run init_weight_sync"
            )
        self.stream.wait_stream(torch.cuda.current_stream())
        self.group.broadcast(staged.handle, src=0, stream=self.stream)

    def release(self, staged: Staged) -> None:
        """Keeps the memory from being used again before the broadcast has read it.

        The buffer itself goes with the caller's `Staged`.
        """
        staged.handle.record_stream(self.stream)

    def close(self) -> None:
        """Leaves the group; a second call does nothing."""
        self.group = None
