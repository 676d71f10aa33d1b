"""The shm transport: buckets are files in shared memory, for engines on the learner's host
(CPU hosts, tests).

The sender writes a file. The engines map it without copying and load from the mapping. Once all have
answered, the sender unlinks it. An engine may still hold a mapping then, because a layer whose tensors span
two buckets is loaded with the second one. Its pages live until it lets go, so a file is never written twice.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.transport import Staged

FOLDER = Path("/dev/shm")
"""Memory that looks like files: no disk is written."""


def _pid_namespace() -> int:
    """Containers may share /dev/shm but not process ids, so a process can tell only the dead of
    its own namespace.
    """
    return os.stat("/proc/self/ns/pid").st_ino


def create_file(path: Path, nbytes: int) -> None:
    """Makes a file of `nbytes` with all its pages reserved.

    Without that, tmpfs kills the writer (SIGBUS) where the pages run out. ValueError: there is no room; no
    file is left.
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
    """Implements `Transport`. check: compute checksums. folder: where the buckets are written."""

    name = "shm"

    def __init__(self, *, check: bool = True, folder: Path = FOLDER) -> None:
        self.check = check
        self.folder = folder
        self.prefix = f"gspo-{_pid_namespace()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.count = 0
        self._sweep()

    def _sweep(self) -> None:
        """Removes the buckets of senders that were killed: nobody else would give their memory back."""
        for path in self.folder.glob(f"gspo-{_pid_namespace()}-*-*"):
            sender = path.name.split("-")[2]
            if sender.isdigit() and not Path("/proc", sender).exists():
                path.unlink(missing_ok=True)

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """The same for every engine: files need no rank."""
        return {"transport": self.name, "check": self.check}

    def connect(self) -> None:
        """Nothing to meet, because files need no rendezvous."""

    def stage(self, bucket: Sequence[NamedTensor]) -> Staged:
        """Writes one bucket to a new file.

        Checksums are of the source where that is in host memory, so that a torn copy shows; a GPU's tensors
        are summed in the file.
        """
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
        """Nothing to push, because the engines read the file."""

    def release(self, staged: Staged) -> None:
        """Unlinks the bucket's file."""
        staged.handle.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes what an interrupted transfer left."""
        for path in self.folder.glob(f"{self.prefix}-*"):
            path.unlink(missing_ok=True)


class ShmSource:
    """The engine worker's side. It needs no meeting."""

    checksum = staticmethod(host_checksum)
    arrives_later = False

    def begin(self, update_info: Mapping[str, Any]) -> Callable[[], list[NamedTensor]]:
        """Maps a bucket from its file, where it lies already. Raises what `map_bucket` raises."""
        tensors = map_bucket(update_info)
        return lambda: tensors

    def close(self) -> None:
        """Nothing to leave."""


def map_bucket(update_info: Mapping[str, Any]) -> list[NamedTensor]:
    """The receiver's side: the tensors of a bucket, mapped from its file.

    The mapping is private: writing to a tensor changes nobody else's. ValueError: no such file on this host,
    or a file that is shorter than its layout says.
    """
    path, layout = update_info["path"], BucketLayout.from_dict(update_info["layout"])
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise ValueError(
            f"weight bucket {path} does not exist on {socket.gethostname()}: it was written on "
            f"{update_info['host']}; the shm transport needs engines on the learner's host "
            "(rollout.weight_sync.transport=auto or gloo across hosts)"
        ) from None
    if size < layout.nbytes:
        raise ValueError(
            f"weight bucket {path} holds {size} bytes, its layout needs {layout.nbytes}: torn write"
        )
    if not layout.nbytes:
        return []
    buffer = torch.from_file(path, shared=False, size=layout.nbytes, dtype=torch.uint8)
    return list(layout.views(buffer))
