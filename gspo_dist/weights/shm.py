"""The shm transport: buckets as files in shared memory, for engines on the learner's host (CPU hosts, tests).

The sender writes a file, the engines map it (no copy) and load from the mapping; once all have answered, the
sender unlinks it. An engine may still hold a mapping then (a layer whose tensors span two buckets is loaded
with the second one): its pages live until it lets go, which is why a file is never written twice.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.stream import NamedTensor

FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class Staged:
    """A bucket ready to be delivered: what the engines are told, and what the sender knows of it."""

    update_info: dict[str, Any]
    checksums: dict[str, int]
    nbytes: int
    seconds_checking: float
    handle: Any = None


def _pid_namespace() -> int:
    """Containers may share /dev/shm and not their process ids: only one's own dead can be told."""
    return os.stat("/proc/self/ns/pid").st_ino


def create_file(path: Path, nbytes: int) -> None:
    """Makes a file with all its pages reserved: tmpfs would kill the writer (SIGBUS) where they run out
    later.
    """
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as e:
        path.unlink()
        if e.errno != errno.ENOSPC:
            raise
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        raise ValueError(
            f"{path.parent} has no room for a weight bucket: {nbytes / 2**20:.0f} MiB wanted, "
            f"{free / 2**20:.0f} MiB free; lower rollout.weight_sync.bucket_mib, or give the container "
            "more (docker run --shm-size)"
        ) from e
    finally:
        os.close(fd)


class ShmTransport:
    """Sender side: implements `Transport`."""

    name = "shm"

    def __init__(self, *, check: bool = True, folder: Path = FOLDER) -> None:
        self.check = check
        self.folder = folder
        self.prefix = f"gspo-{_pid_namespace()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.count = 0
        self._sweep()

    def _sweep(self) -> None:
        """Removes the buckets of senders that were killed: memory that nobody else would give back."""
        for path in self.folder.glob(f"gspo-{_pid_namespace()}-*-*"):
            sender = path.name.split("-")[2]
            if sender.isdigit() and not Path("/proc", sender).exists():
                path.unlink(missing_ok=True)

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """What engine `engine_index` is told once, before the first update."""
        return {"check": self.check}

    def connect(self) -> None:
        """Nothing to meet: files need no rendezvous."""

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged:
        """Writes one bucket to a new file. Checksums are of the source where that is in host memory."""
        layout = BucketLayout.of(bucket)
        path = self.folder / f"{self.prefix}-{self.count}"
        self.count += 1
        create_file(path, max(layout.nbytes, 1))
        try:
            buffer = torch.from_file(str(path), shared=True, size=max(layout.nbytes, 1), dtype=torch.uint8)
            layout.fill(buffer, bucket)
            start = time.perf_counter()
            checksums = {}
            if self.check:
                written = dict(layout.views(buffer))
                checksums = {n: host_checksum(t if t.device.type == "cpu" else written[n]) for n, t in bucket}
            seconds = time.perf_counter() - start
        except BaseException:
            path.unlink()
            raise
        info = {"path": str(path), "host": socket.gethostname(), "layout": layout.to_dict()}
        return Staged(info, checksums, sum(t.nbytes for _, t in bucket), seconds, path)

    def send(self, staged: Staged) -> None:
        """Nothing to push: the engines read the file."""

    def release(self, staged: Staged) -> None:
        """Unlinks the bucket's file."""
        staged.handle.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes what an interrupted transfer left."""
        for path in self.folder.glob(f"{self.prefix}-*"):
            path.unlink(missing_ok=True)


def map_bucket(update_info: Mapping[str, Any]) -> list[NamedTensor]:
    """Receiver side: the tensors of a bucket, mapped from its file (private: writing to them changes no one
    else's).
    """
    path, layout = update_info["path"], BucketLayout.from_dict(update_info["layout"])
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise ValueError(
            f"weight bucket {path} does not exist on {socket.gethostname()}: it was written on "
            f"{update_info['host']}; the shm transport needs engines on the learner's host "
            "(rollout.weight_sync.transport=nccl across hosts)"
        ) from None
    if size < layout.nbytes:
        raise ValueError(
            f"weight bucket {path} holds {size} bytes, its layout needs {layout.nbytes}: torn write"
        )
    if not layout.nbytes:
        return []
    buffer = torch.from_file(path, shared=False, size=layout.nbytes, dtype=torch.uint8)
    return list(layout.views(buffer))
