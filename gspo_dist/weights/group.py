"""A process group of the learner's exporter (rank 0) and every engine worker, which only broadcasts.

All ranks meet at a TCP store that rank 0 opens. Who has arrived is written there, so that a meeting that
fails says who did not come. Then the backend connects: gloo through torch's process group, nccl through
vLLM's communicator. Everything else is the same for both, so that what a cluster of CPU hosts tests is what a
GPU cluster runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import BroadcastOptions, PrefixStore, Store, TCPStore

from gspo_dist.failures import first_line
from gspo_dist.weights.verify import WeightSyncError

POLL_S = 0.0005
"""Seconds between two looks at a broadcast on a GPU."""
EXIT_S = 5.0
"""Longest that the end of a process waits for a gloo group whose last broadcast is under way."""


class TransferFailed(WeightSyncError):
    """Bytes did not arrive: a rank is gone, a link is cut, or the time was over."""


class MissingRanks(TransferFailed):
    """The meeting was over before every rank had come."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"ranks {ranks} did not come to the rendezvous of the weight sync")
        self.ranks = ranks


@dataclass(frozen=True)
class Meeting:
    """Where and with how many a group meets. Plain data: it travels to the engines."""

    backend: str
    """nccl or gloo."""
    address: str
    """Of the learner's host, as every engine's host reaches it."""
    port: int
    """Of the store on that host."""
    world_size: int
    """The exporter and every engine worker."""
    timeout_s: float
    """Longest wait for the others to come, and for one broadcast whose caller sets no limit."""


class Broadcast(Protocol):
    """One broadcast that was started."""

    def wait(self, seconds: float) -> None:
        """Returns when the bytes are there (or have left). TransferFailed: it failed, or the time is over."""
        ...

    def done(self) -> bool:
        """True once nothing reads or writes the buffer any more."""
        ...


class Group(Protocol):
    """The members that met."""

    device: torch.device
    """Where the buffers of a broadcast lie."""

    def broadcast(self, buffer: torch.Tensor) -> Broadcast:
        """Starts to send `buffer` from rank 0 to all others, without waiting for them."""
        ...

    def close(self) -> None:
        """Leaves the group, also one whose other members are gone. Never waits for them."""
        ...


def open_store(address: str, timeout_s: float) -> TCPStore:
    """Rank 0's store, on a port that the system chooses: nobody can take it between choosing and opening."""
    return TCPStore(address, 0, is_master=True, timeout=timedelta(seconds=timeout_s))


def join(meeting: Meeting, rank: int, store: Store | None = None) -> Group:
    """Meets the others and connects; every rank calls it at the same time. store: rank 0's own.

    MissingRanks, on rank 0: who did not come in time. TransferFailed: this rank cannot reach the
    store or the others.
    """
    # Rank 0 knows who is missing, so it gives up before the others, who would only say that they wait.
    deadline = time.monotonic() + meeting.timeout_s * (0.8 if rank == 0 else 1.0)

    def left() -> timedelta:
        return timedelta(seconds=max(0.01, deadline - time.monotonic()))

    here = socket.gethostname()
    with _as_transfer_failed(f"rank {rank} on {here} could not meet the learner's exporter", meeting):
        if store is None:
            store = TCPStore(meeting.address, meeting.port, timeout=left())
        store.set(f"rank/{rank}", here)
        if rank == 0:
            missing = [r for r in range(1, meeting.world_size) if not _comes(store, f"rank/{r}", left())]
            if missing:
                raise MissingRanks(missing)
            store.set("all", "here")
        else:
            store.wait(["all"], left())
    connect: Callable[..., Group] = GlooGroup if meeting.backend == "gloo" else NcclGroup
    with _as_transfer_failed(f"rank {rank} on {here} could not connect to the other ranks", meeting):
        return connect(PrefixStore(meeting.backend, store), meeting, rank, left())


def _comes(store: Store, key: str, wait: timedelta) -> bool:
    try:
        store.wait([key], wait)
    except RuntimeError:  # torch 2.13 says both timeout and a lost store with it; rank 0 cannot lose its own
        return False
    return True


@contextlib.contextmanager
def _as_transfer_failed(what: str, meeting: Meeting) -> Iterator[None]:
    try:
        yield
    except WeightSyncError:
        raise
    except RuntimeError as error:
        raise TransferFailed(
            f"{what} by {meeting.backend} at {meeting.address}:{meeting.port} within "
            f"{meeting.timeout_s:.0f} s ({first_line(error)[:300]}); check that the hosts reach each other "
            "on any port, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where a host has several networks"
        ) from error


def address_towards(host: str, port: int) -> str:
    """This host's address on the network over which it reaches `host`. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


class GlooGroup:
    """Over torch's gloo, between hosts without GPUs, or with GPUs that NCCL cannot join."""

    device = torch.device("cpu")

    def __init__(self, store: Store, meeting: Meeting, rank: int, wait: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch 2.13's stubs
        # gloo would take the address that the host's own name resolves to, which is 127.0.1.1 on many
        # systems: no other host reaches it. The address that reaches the exporter is one that it reaches.
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        where = (
            {"interface": interface}
            if interface
            else {"hostname": address_towards(meeting.address, meeting.port)}
        )
        options._devices = [ProcessGroupGloo.create_device(**where)]
        options._timeout = wait
        self.group: Any = ProcessGroupGloo(store, rank, meeting.world_size, options)
        # While connecting, the time that is left; later, each broadcast's own limit comes first.
        self.group.set_timeout(timedelta(seconds=meeting.timeout_s))
        self.last: GlooBroadcast | None = None
        atexit.register(_leave, weakref.ref(self))  # a group that lives at exit aborts the process
        self.options = BroadcastOptions()
        self.options.rootRank, self.options.rootTensor = 0, 0

    def broadcast(self, buffer: torch.Tensor) -> Broadcast:
        self.last = GlooBroadcast(self.group.broadcast([buffer], self.options))
        return self.last

    def close(self) -> None:
        kept, self.group = [self.group], None  # an idle group is destroyed when `kept` goes, on return
        # torch 2.13 waits for an unfinished broadcast when it destroys a group, up to its timeout. A thread
        # waits there, and the end of the process for the thread: overtaken by it, gloo aborts the process.
        if self.last is not None and not self.last.done():
            _closing.append(threading.Thread(target=kept.clear, daemon=True, name="gloo-close"))
            _closing[-1].start()


_closing: list[threading.Thread] = []


def _leave(group: weakref.ref[GlooGroup]) -> None:
    left = group()
    if left is not None and left.group is not None:
        left.close()


@atexit.register  # runs after every _leave: the last one registered comes first
def _wait_for_closing() -> None:
    deadline = time.monotonic() + EXIT_S
    for thread in _closing:
        thread.join(max(0.0, deadline - time.monotonic()))


class GlooBroadcast:
    """torch's handle; it keeps the buffer alive."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self, seconds: float) -> None:
        try:
            self.work.wait(timedelta(seconds=max(0.001, seconds)))
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise TransferFailed(f"a bucket did not arrive by gloo within {seconds:.3g} s") from error
            raise TransferFailed(
                f"a bucket was lost on its way by gloo: {first_line(error)[:300]}"
            ) from error

    def done(self) -> bool:
        return bool(self.work.is_completed())


class NcclGroup:
    """Over vLLM's NCCL communicator, between GPUs: each rank's current one."""

    def __init__(self, store: Store, meeting: Meeting, rank: int, wait: timedelta) -> None:
        # Late: only GPU hosts need it, and vLLM reads its environment on import.
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self.device = torch.device("cuda", torch.cuda.current_device())
        if rank == 0:
            store.set("id", bytes(NCCLLibrary().ncclGetUniqueId()).hex())
        store.wait(["id"], wait)
        # The id by hand and not through vLLM's StatelessProcessGroup, which would unpickle what lies in the
        # store: any process that reaches the port could then run code here.
        self.comm = PyNcclCommunicator.from_unique_id_bytes(
            bytes.fromhex(store.get("id").decode()), rank, meeting.world_size, self.device
        )
        require_nccl(self.comm)
        # A stream of its own: what the process computes must not queue behind a broadcast whose other side
        # may be dead.
        self.stream = torch.cuda.Stream()

    def broadcast(self, buffer: torch.Tensor) -> Broadcast:
        self.stream.wait_stream(torch.cuda.current_stream())
        self.comm.broadcast(buffer, src=0, stream=self.stream)
        buffer.record_stream(self.stream)  # the allocator must not hand it out before the broadcast is over
        event = torch.cuda.Event()
        event.record(self.stream)
        return NcclBroadcast(event)

    def close(self) -> None:
        self.comm.destroy()


def require_nccl(comm: Any) -> None:
    """Raises WeightSyncError when `comm` found no NCCL.

    vLLM 0.30 only marks such a communicator as `disabled`, and its broadcasts then do nothing.
    """
    if comm.disabled:
        raise WeightSyncError(
            "the nccl transport found no NCCL that vLLM can use: unset VLLM_DISABLE_PYNCCL, check "
            "VLLM_NCCL_SO_PATH, or set rollout.weight_sync.transport=gloo"
        )


class NcclBroadcast:
    """An event behind the broadcast on its stream."""

    def __init__(self, event: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.event, self.clock = event, clock

    def wait(self, seconds: float) -> None:
        # Not event.synchronize(): NCCL waits for a dead peer for ever, and so would this process.
        deadline = self.clock() + seconds
        while not self.event.query():
            if self.clock() > deadline:
                raise TransferFailed(f"a bucket did not arrive by nccl within {seconds:.3g} s")
            time.sleep(POLL_S)
        torch.cuda.current_stream().wait_event(self.event)

    def done(self) -> bool:
        return bool(self.event.query())
