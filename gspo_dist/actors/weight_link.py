"""The exporter's connection to the engines: the transport, the meeting, the delivery, and who is to blame."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import ray

from gspo_dist.actors.process import Actors, ProcessDied, ProcessTimeout
from gspo_dist.config import WeightSyncConfig
from gspo_dist.failures import first_line
from gspo_dist.weights.group import TransferFailed
from gspo_dist.weights.send import SentReport, Transport, make_transport, send_weights
from gspo_dist.weights.shm import FOLDER
from gspo_dist.weights.stream import NamedTensor

LINK_SHARE = 0.9
"""Of `timeout_s`, which the trainer waits for the learner: the exporter gives up on the engines before that.
An engine gives up on a bucket after the same share of what the exporter has left."""
GRACE_S = 5.0
"""How long the news of a death may be behind the error of an engine that only noticed it."""


class WeightLink:
    """Connected when it is made, for one set of engines; `send` may be called once per publication."""

    def __init__(self, sync: WeightSyncConfig, engines: Actors, address: str, deadline: float) -> None:
        """address: this host's, as the engines reach it. deadline: of the monotonic clock, for the meeting.

        Raises what either side of the meeting raised.
        """
        self.engines = engines
        self.transport = self._choose(sync, address, deadline)
        try:
            self._meet(deadline)
        except BaseException:
            self.close()
            raise
        print(f"weight sync: {self.transport.name} to {', '.join(engines.handles)}", flush=True)

    def reaches(self, engines: Mapping[str, Any]) -> bool:
        """Whether it was made for these very processes: one that was started anew has another handle."""
        return self.engines.handles == dict(engines)

    def _choose(self, sync: WeightSyncConfig, address: str, deadline: float) -> Transport:
        name = sync.transport
        if name in ("auto", "shm"):
            afar = self._engines_afar(deadline)
            if afar and name == "shm":
                raise ValueError(
                    "rollout.weight_sync.transport=shm needs engines on the learner's host: "
                    f"{', '.join(afar)} cannot see its {FOLDER}; use auto or gloo"
                )
            name = "gloo" if afar else "shm"
        if name == "shm":
            return make_transport(name, check=sync.check)
        engine, handle = next(iter(self.engines.handles.items()))  # the engines are alike
        info = self.engines.gather({engine: handle.info.remote()}, _left(deadline))[engine]
        return make_transport(
            name,
            check=sync.check,
            address=address,
            engines=list(self.engines.handles),
            engine_workers=info.workers,
            timeout_s=LINK_SHARE * _left(deadline),
        )

    def _engines_afar(self, deadline: float) -> list[str]:
        """The engines that do not see what this process writes to shared memory.

        Host names would not do: two containers of one host may have one name and two /dev/shm.
        """
        token = secrets.token_hex(16)
        path = FOLDER / f"gspo-here-{os.getpid()}-{token[:8]}"
        path.write_text(token)
        try:
            seen = self.engines.call_all("sees", str(path), token, timeout=_left(deadline))
        finally:
            path.unlink()
        return [name for name, sees in seen.items() if not sees]

    def _meet(self, deadline: float) -> None:
        refs = {
            name: handle.init_weight_sync.remote(self.transport.init_info(i))
            for i, (name, handle) in enumerate(self.engines.handles.items())
        }
        # In threads: each side of the rendezvous waits for the other, and whoever cannot come must be heard
        # at once, not after the other's timeout. A thread also keeps to itself the CUDA stream that vLLM 0.30
        # makes current to connect.
        meeting = ThreadPoolExecutor(2, thread_name_prefix="weight-rendezvous")
        sides: list[Future[Any]] = [
            meeting.submit(self.transport.connect),
            meeting.submit(self.engines.gather, refs, _left(deadline)),
        ]
        meeting.shutdown(wait=False)
        ended = wait(sides, return_when=FIRST_EXCEPTION).done
        for side in sides:
            if side in ended:
                side.result()

    def send(self, stream: Iterable[Sequence[NamedTensor]], deadline: float) -> SentReport:
        """Sends one publication. Raises what is worst of what the engines raised, with the engine's name."""

        def deliver(info: dict[str, Any]) -> None:
            seconds = LINK_SHARE * _left(deadline)
            refs = {
                name: handle.update_weights.remote({**info, "seconds": seconds})
                for name, handle in self.engines.handles.items()
            }
            hear_all(self.engines, refs, deadline)

        return send_weights(stream, self.transport, deliver)

    def close(self) -> None:
        """Leaves the engines, whatever became of them. A second call does nothing."""
        self.transport.close()


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def hear_all(engines: Actors, refs: Mapping[str, Any], deadline: float) -> None:
    """Waits for every engine's answer to one bucket. Raises the failure that explains the others.

    A bucket passes from engine to engine, so one that died makes others fail, and they may be heard first.
    Therefore an engine that died comes before one that failed by itself, that one before those that did not
    answer, and last come those that say what they missed. Raises ProcessDied, ProcessTimeout or what an
    engine raised, with notes that name the others.
    """
    pending = {ref: name for name, ref in refs.items()}
    failures: dict[str, Exception] = {}
    until = deadline
    while pending and not any(isinstance(e, ProcessDied) for e in failures.values()):
        done, _ = ray.wait(list(pending), timeout=max(0.0, until - time.monotonic()))
        if not done:
            break
        name = pending.pop(done[0])
        try:
            engines.gather({name: done[0]}, GRACE_S)
        except Exception as error:
            failures[name] = error
            # What did not arrive may be another's fault, which the others' answers tell. Any other failure is
            # the engine's own, and only a death could explain it better.
            if not isinstance(error, TransferFailed):
                until = min(until, time.monotonic() + GRACE_S)
    if failures or pending:
        raise _worst(failures, list(pending.values()), engines)


def _worst(failures: Mapping[str, Exception], late: Sequence[str], engines: Actors) -> Exception:
    deaths = [e for e in failures.values() if isinstance(e, ProcessDied)]
    own = [e for e in failures.values() if not isinstance(e, ProcessDied | TransferFailed)]
    if deaths or own:
        worst = (deaths or own)[0]
    elif late:
        worst = ProcessTimeout(
            f"{', '.join(late)} did not answer to a bucket of weights in time "
            f"(rollout.weight_sync.timeout_s); check the process, its host and the link to it\n"
            f"{engines.tail(late[0])}"
        )
    else:
        worst = next(iter(failures.values()))
    for name, failure in failures.items():
        if failure is not worst:
            worst.add_note(f"{name} then said: {first_line(failure)}")
    return worst
