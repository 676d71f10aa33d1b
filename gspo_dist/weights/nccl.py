"""The nccl transport: buckets as one broadcast each from the learner's exporter to every engine worker, GPU
to GPU.

Stands on vLLM's NCCL weight transfer (a process group of its own, learner rank 0, workers after it) and sends
a whole bucket in one call: 18,000 expert tensors of a 30B model one by one would pay 18,000 launches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import device_checksum
from gspo_dist.weights.shm import Staged
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.verify import WeightSyncError

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator


def require_nccl(group: Any) -> None:
    """vLLM 0.30's communicator that found no NCCL is only `disabled`, and its broadcasts then do nothing."""
    if group.disabled:
        raise WeightSyncError(
            "the nccl transport found no NCCL that vLLM can use: unset VLLM_DISABLE_PYNCCL, check VLLM_NCCL_SO_PATH, or "
            "set rollout.weight_sync.transport=shm"
        )


class NcclTransport:
    """Sender side: implements `Transport`. `engine_workers`: GPUs of one engine (its tensor_parallel)."""

    name = "nccl"

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
        """What engine `engine_index` is told once; its workers join at rank 1 + engine_index x
        engine_workers.
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
        """Joins the group as rank 0; returns once every engine has (they join in `init_weight_sync`)."""
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
        # A stream of its own: staging the next bucket must not queue behind a broadcast whose receivers may
        # be dead.
        self.stream = torch.cuda.Stream()

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged:
        """Packs one bucket on the GPU."""
        layout = BucketLayout.of(bucket)
        flat = torch.empty(max(layout.nbytes, 1), dtype=torch.uint8, device="cuda")
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
        """Keeps the memory from being reused before the broadcast has read it; the reference then goes with
        the caller's `Staged`.
        """
        staged.handle.record_stream(self.stream)

    def close(self) -> None:
        """Leaves the group."""
        self.group = None
