"""Python in the sandbox, as a tool or as an environment: what a program prints is the answer."""

from __future__ import annotations

import functools
from typing import NamedTuple

from gspo_dist.environments.protocol import Observation, ToolFailure
from gspo_dist.sandbox.choose import sandbox_named
from gspo_dist.sandbox.protocol import Limits, Program, Sandbox, SandboxError
from gspo_dist.types import Prompt

LIMITS = Limits(time_s=6.0, memory_mb=512)


class Ran(NamedTuple):
    """What became of a program."""

    text: str
    """What it printed, and the last line of its standard error where it failed."""
    is_ok: bool
    """Whether it came to its end."""


def python(code: str) -> str:
    """Runs a Python program and returns what it prints.

    code: the program, which sees no network and no files of the host
    """
    try:
        return run(code).text
    except SandboxError as error:
        raise ToolFailure(f"the sandbox failed: {error}") from error


def run(code: str, sandbox: str = "auto", limits: Limits = LIMITS) -> Ran:
    """Runs a program in a sandbox of its own. SandboxError: the sandbox failed, and not the program."""
    with _sandbox(sandbox).open(Program(code), limits) as opened:
        outcome = opened.run("")
    if outcome.status == "ok":
        return Ran(outcome.stdout.rstrip("\n"), is_ok=True)
    last = outcome.stderr.strip().splitlines()[-1:] or [outcome.status]
    return Ran(f"{outcome.stdout}Error ({outcome.status}): {last[0]}", is_ok=False)


@functools.cache
def _sandbox(name: str) -> Sandbox:
    return sandbox_named(name)


python.check = functools.partial(_sandbox, "auto")  # type: ignore[attr-defined]  # resolve.py asks it


class Python:
    """One episode of a policy that writes plain text: a turn that ends with a semicolon is a program.

    Set `environment.stop: [";"]`, so that the semicolon ends a turn. The answer is what the program prints,
    or ? where it fails. The first turn without a semicolon at its end is the last.
    """

    def __init__(self, sandbox: str = "auto", time_s: float = 6.0, memory_mb: int = 512) -> None:
        """sandbox: a name of gspo_dist/sandbox/README.md. time_s, memory_mb: per program."""
        self.sandbox, self.limits = sandbox, Limits(time_s=time_s, memory_mb=memory_mb)
        _sandbox(sandbox)  # a host without one says so before the run

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Nothing is said."""

    def step(self, turn: str) -> Observation:
        """What the program prints. Parts: tool_calls and tool_errors."""
        if not turn.endswith(";"):
            return Observation(done=True)
        ran = run(turn, self.sandbox, self.limits)
        parts = {"tool_calls": 1.0, "tool_errors": float(not ran.is_ok)}
        return Observation(ran.text if ran.is_ok else "?", parts=parts)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Every program runs in a sandbox of its own: nothing is kept between turns."""
