"""What every actor process shares: its log file, the gathering of answers, and the news of a death."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from gspo_dist.failures import ProcessDied as ProcessDied
from gspo_dist.failures import ProcessTimeout as ProcessTimeout
from gspo_dist.failures import first_line
from gspo_dist.host import Place
from gspo_dist.weights.verify import WeightSyncError

ASK_S = 60.0
"""Longest wait for what an actor says of itself, such as its place. It may be in the middle of a call."""
TAIL_LINES = 15
"""Lines of an actor's log that an error shows."""

REFUSALS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, WeightSyncError)
"""What an actor raises because of what it was asked. Any other error means that it is broken."""


class ActorProcess:
    """Base of the actors: sends stdout and stderr to a log file, answers for its host and memory.

    Ray runs an actor's methods one at a time, in the main thread of its process.
    """

    def __init__(self, name: str, log_dir: str) -> None:
        """Redirects the output of this whole process to `log_dir/name.log`. Earlier content is kept."""
        self.name = name
        path = Path(log_dir) / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        # Descriptors, not sys.stdout: what C++ libraries and child processes write belongs in the log too.
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)

    def host(self) -> tuple[str, int]:
        """This node's address and a free port on it, for a process group's rendezvous.

        The port is free when it is asked for, and not reserved: it should be used at once.
        """
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def place(self) -> Place:
        """This node's address, and the GPUs that this process sees."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Place(ray.util.get_node_ip_address(), tuple(gpu for gpu in gpus.split(",") if gpu))

    def peak_memory(self) -> dict[str, int]:
        """Peak resident bytes on the host, and peak allocated bytes on the GPU where there is one."""
        import resource

        import torch

        peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
        if torch.cuda.is_available():
            peaks["gpu"] = torch.cuda.max_memory_allocated()
        return peaks


class Actors:
    """A set of named actor handles whose calls are gathered together."""

    def __init__(self, handles: Mapping[str, Any], log_dir: Path) -> None:
        """handles: name -> Ray actor handle. log_dir: where each actor writes `name.log`."""
        self.handles = dict(handles)
        self.log_dir = log_dir

    def call_all(self, method: str, *args: Any, timeout: float, **kwargs: Any) -> dict[str, Any]:
        """The same call on every actor: answers by name. Raises what `gather` raises."""
        return self.gather(
            {name: getattr(handle, method).remote(*args, **kwargs) for name, handle in self.handles.items()},
            timeout,
        )

    def gather(self, refs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Waits at most `timeout` seconds for every object of `refs` (name -> reference). Answers by name.

        The first failure is raised at once: the others may wait in a collective for the rank that failed.
        Raises ProcessDied, ProcessTimeout, or what the actor raised. Each message names the actor.
        """
        names = {ref: name for name, ref in refs.items()}
        pending, answers = list(names), dict[str, Any]()
        deadline = time.monotonic() + timeout
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = [names[ref] for ref in pending]
                raise ProcessTimeout(
                    f"no answer within {timeout:.0f} s from {', '.join(late)}\n{self.tail(late[0])}"
                )
            for ref in done:
                answers[names[ref]] = self._result(names[ref], ref)
        return {name: answers[name] for name in refs}

    def death_among(self, refs: Mapping[str, Any], timeout: float) -> ProcessDied | None:
        """The end of an actor that owes an answer, if one is told within `timeout` seconds. Other errors and
        answers are passed over.
        """
        names = {ref: name for name, ref in refs.items()}
        pending, deadline = list(names), time.monotonic() + timeout
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                return None
            for ref in done:
                try:
                    self._result(names[ref], ref)
                except ProcessDied as death:
                    return death
                except Exception:
                    continue
        return None

    def each(
        self, refs: Mapping[str, Any], timeout: float, *, deaths_only: bool = False
    ) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Waits at most `timeout` seconds for every object. Returns (answers, failures), both by name.

        For actors that do not need each other: a failure holds nobody off. It is ProcessDied, ProcessTimeout,
        or what broke in the actor. An actor's refusal (ValueError, WeightSyncError and other errors that are
        the caller's fault) is raised, once all have answered. deaths_only: so is every other error of it.
        """
        _, late = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout) if refs else ([], [])
        answers, failures, refusals = dict[str, Any](), dict[str, Exception](), list[Exception]()
        for name, ref in refs.items():
            if ref in late:
                failures[name] = ProcessTimeout(
                    f"{name} gave no answer within {timeout:.0f} s\n{self.tail(name)}"
                )
                continue
            try:
                answers[name] = self._result(name, ref)
            except REFUSALS as error:
                refusals.append(error)
            except (ProcessDied, ProcessTimeout) as error:
                failures[name] = error
            except Exception as error:
                if deaths_only:
                    refusals.append(error)
                else:
                    failures[name] = error
        if refusals:
            raise refusals[0]
        return answers, failures

    def _result(self, name: str, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            # Ray wraps what the actor raised; a caller catches ValueError, not RayTaskError.
            cause = error.cause if isinstance(error.cause, Exception) else error
            cause.add_note(f"raised in {name}; its log: {self.log_dir / (name + '.log')}\n{self.tail(name)}")
            raise cause from None
        except ray.exceptions.RayActorError as error:
            raise ProcessDied(f"{name} died: {first_line(error)}\n{self.tail(name)}") from None

    def tail(self, name: str) -> str:
        """The last lines of an actor's log, indented, or where the log lies when it is not on this host."""
        path = self.log_dir / f"{name}.log"
        if not path.is_file():
            return (
                f"  (no log at {path} on this host: it lies on the node of {name} unless run_dir is shared)"
            )
        lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(["  last lines of its log:", *(f"    {line}" for line in lines)])

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """Name -> peak bytes of `host` and, with a GPU, `gpu`."""
        return self.call_all("peak_memory", timeout=ASK_S)

    def ask_to_close(self, timeout: float) -> None:
        """Calls `close` of every actor and waits for those that answer within `timeout` seconds."""
        refs = [handle.close.remote() for handle in self.handles.values()]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=timeout)

    def kill(self) -> None:
        """Ends every actor without asking it. Killing one that is dead already does nothing."""
        for handle in self.handles.values():
            ray.kill(handle)
