"""Ray on a virtual clock: answers come when a test says so, and only waiting lets time pass.

A module under test gets it in place of its own `ray` and `time`, so that hours of waiting take no time and
every number is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray

NEVER = math.inf
MOST_WAITS = 1000
"""A test that waits more often is in a loop without an end. It fails then, and does not hang."""


class Ref:
    """An answer on its way."""

    def __init__(self, at: float, value: Any) -> None:
        """at: when it is there, on the clock. value: what it is, or the exception that is raised instead."""
        self.at, self.value = at, value


class VirtualRay:
    """Stands for the modules ray and time."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.now = 0.0
        self.killed: list[Handle] = []
        self.waits: list[float | None] = []
        """The timeouts of all calls of `wait`."""
        self.calls: list[tuple[Any, ...]] = []
        """(actor, method, arguments) of every call."""
        self.answers: dict[Any, list[Any]] = {}
        """(actor, method), or a method -> its answers, one per call, and the last one from then on: seconds,
        or (seconds, value). What is not here is answered with None at once."""

    def stand_in(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """Takes the place of ray and time in these modules, and nowhere else."""
        for module in modules:
            for name in ("ray", "time"):
                if hasattr(module, name):
                    patch.setattr(module, name, self)

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def wait(
        self, refs: Sequence[Ref], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        """At most `num_returns` that are there, and the rest, as Ray does."""
        if not 0 < num_returns <= len(set(refs)) == len(refs):
            raise ValueError(f"ray.wait takes different references, and some of them: got {refs}")
        self.waits.append(timeout)
        assert len(self.waits) < MOST_WAITS, "this would wait again and again"
        last = sorted(ref.at for ref in refs)[num_returns - 1]
        until = last if timeout is None else min(last, self.now + timeout)
        assert until < NEVER, "this would wait for ever"
        self.now = max(self.now, until)
        ready = [ref for ref in refs if ref.at <= self.now][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref, timeout: float = NEVER) -> Any:
        until = min(ref.at, self.now + timeout)
        assert until < NEVER, "this would wait for ever"
        self.now = max(self.now, until)
        if ref.at > self.now:
            raise ray.exceptions.GetTimeoutError("no answer in time")
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, handle: Handle) -> None:
        self.killed.append(handle)

    def put(self, value: Any) -> Any:
        return value

    def remote(self, kind: type) -> Any:
        """Actors of `kind`, by the name that is the first argument of their constructor, if they have one."""
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(
                remote=lambda name=kind.__name__, *made: Handle(self, name, options, made)
            )
        )


class Handle:
    """An actor of a virtual Ray. Its calls are answered by `VirtualRay.answers`."""

    def __init__(
        self, world: VirtualRay, name: str, options: Mapping[str, Any] | None = None, made: Any = ()
    ) -> None:
        self.world, self.name, self.options, self.made = world, name, options, made

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any, **kwargs: Any) -> Ref:
            self.world.calls.append((self.name, method, *args, *kwargs.values()))
            answers = self.world.answers.get((self.name, method)) or self.world.answers.get(method) or [0.0]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            seconds, value = answer if isinstance(answer, tuple) else (answer, None)
            return Ref(self.world.now + seconds, value)

        return SimpleNamespace(remote=remote)


def died(why: str = "its process is gone") -> Exception:
    """What Ray raises for the answer of an actor that ended."""
    return ray.exceptions.RayActorError(error_msg=why)


def raised(error: Exception) -> Exception:
    """What Ray raises for the answer of an actor that raised `error`."""
    return ray.exceptions.RayTaskError("method", "its traceback", error)


def due(**answers: Any) -> dict[str, Ref]:
    """Name -> an answer that comes at a time, or (time, value); its name in capitals without a value."""
    return {name: Ref(*(a if isinstance(a, tuple) else (a, name.upper()))) for name, a in answers.items()}
