"""Python in the sandbox as a tool: what a program prints is the answer."""

from __future__ import annotations

import functools

from gspo_dist.environments.protocol import Observation
from gspo_dist.sandbox.choose import sandbox_named
from gspo_dist.sandbox.protocol import Limits, Program, Sandbox
from gspo_dist.types import Prompt

LIMITS = Limits(time_s=6.0, memory_mb=512)


def python(code: str) -> str:
    """Runs a Python program and returns what it prints.

    code: the program; it sees no network and no files of the host
    """
    return run(code)


def run(code: str, sandbox: str = "auto", limits: Limits = LIMITS) -> str:
    """What the program prints; the end of its standard error where it fails."""
    with _sandbox(sandbox).open(Program(code), limits) as opened:
        outcome = opened.run("")
    if outcome.status != "ok":
        last = outcome.stderr.strip().splitlines()[-1:] or [outcome.status]
        return f"{outcome.stdout}Error ({outcome.status}): {last[0]}"
    return outcome.stdout.rstrip("\n")


@functools.cache
def _sandbox(name: str) -> Sandbox:
    return sandbox_named(name)


class Python:
    """One episode of a policy that writes plain text: a turn that ends with ";" is a program.

    Set `environment.stop: [";"]`. What it prints is answered, an error as ?. The first other turn is the
    last.
    """

    def __init__(self, sandbox: str = "auto", time_s: float = 6.0, memory_mb: int = 512) -> None:
        self.sandbox, self.limits = sandbox, Limits(time_s=time_s, memory_mb=memory_mb)
        _sandbox(sandbox)  # a host without one says so before the run

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Nothing is said."""

    def step(self, turn: str) -> Observation:
        """Parts: tool_calls and tool_errors."""
        if not turn.endswith(";"):
            return Observation(done=True)
        text = run(turn, self.sandbox, self.limits)
        wrong = "Error (" in text
        return Observation("?" if wrong else text, parts={"tool_calls": 1.0, "tool_errors": float(wrong)})

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Every program runs in a sandbox of its own: nothing is kept between turns."""
