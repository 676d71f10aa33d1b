"""What a sandbox is given, what it says, and what it promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gspo_dist.checks import above, at_least


class SandboxError(RuntimeError):
    """The sandbox failed, not the program: a service that is down, a host that refuses. It is no verdict."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    time_s: float = 6.0
    """Wall clock per test."""
    memory_mb: int = 512
    """Address space of each process, and resident memory of all of them together (looked at every 50 ms)."""
    processes: int = 32
    """Processes and threads at a time."""
    files_mb: int = 32
    """All files together; they lie in memory."""
    files: int = 1024
    """Number of files."""
    output_mb: int = 16
    """Standard output of a test, and as much standard error."""

    def __post_init__(self) -> None:
        above("limits.time_s", self.time_s, 0)
        for name in ("memory_mb", "processes", "files_mb", "files", "output_mb"):
            at_least(f"limits.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class Program:
    """A Python program, and how it is called."""

    code: str
    function: str | None = None
    """None: each test is a process that reads standard input. A name: each test calls that method of class
    Solution (made once for all tests), or that function where there is no such class."""
    preamble: str = ""
    """Python that runs before the program in its namespace, such as the imports of a judge."""
    quiet_exit: bool = False
    """Whether sys.exit(1) counts as a normal end, as in LiveCodeBench's runner."""


class Outcome(NamedTuple):
    """How one test ended. It says nothing about right or wrong: nobody in the sandbox knows the answers."""

    status: str
    """ok | error | time | memory | output | files | killed."""
    stdout: str = ""
    stderr: str = ""
    """The last 4,000 characters of standard error, or why there is no result."""
    result: str | None = None
    """A function's result as JSON. An inner tuple is a list that begins with TUPLE."""
    exit_status: int | None = None
    """Negative for a signal."""
    seconds: float = 0.0
    """Wall clock."""


TUPLE = "\x00tuple"
"""Marks inner tuples in results: LiveCodeBench does not take them for lists."""


class Run(Protocol):
    """One program in its sandbox. Use it as a `with` block, which ends all that the program started."""

    def run(self, text: str) -> Outcome:
        """One test: `text` is its standard input, or one JSON argument per line. May be called again.

        Returns within `time_s` + 3 s. Raises SandboxError when the sandbox itself fails.
        """
        ...

    def __enter__(self) -> Run: ...
    def __exit__(self, *error: object) -> None: ...


class Sandbox(Protocol):
    """Where programs run."""

    name: str
    """bubblewrap | namespaces | process | http."""

    def open(self, program: Program, limits: Limits) -> Run:
        """A fresh sandbox for one program. Raises SandboxError when it cannot start."""
        ...
