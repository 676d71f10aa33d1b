"""What a weight sync is asked to do: the numbers that both sides of a publication need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SyncPlan:
    """transport: shm or nccl; check: checksums on both sides; engine_workers: GPUs (tensor-parallel ranks) an engine."""

    transport: str
    check: bool
    bucket_bytes: int
    timeout_s: float
    engine_workers: int = 1
