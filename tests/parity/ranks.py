"""Runs one script as several ranks and returns what each of them saved.

The ranks are real processes without pytest inside them. Importing the libraries takes several times as long
as a tiny job. So a `Crew` keeps its processes for the next job, and forks them from one process that has
imported the libraries and does nothing else. `run_ranks` is a crew for one job.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _environment() -> dict[str, str]:
    """One thread per rank, no network, and `gspo_dist` and `tests` of this checkout."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }


def run_ranks(script: Path, job: dict[str, Any], world_size: int, timeout_s: float = 540.0) -> list[Any]:
    """What each rank saved of one job, which reaches the ranks through torch.save. See `Crew`."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(job, Path(folder) / "job.pt")
        crew = Crew(script, Path(folder))
        try:
            return crew.run(Path(folder), {}, world_size, timeout_s)
        finally:
            crew.end()


# -- what a script does --


def jobs() -> Iterator[tuple[dict[str, Any], int]]:
    """A rank's jobs, and its rank in each. The process that asks first forks the ranks, and never gets a job.

    It reads a JSON line from the crew: where a new rank shall read and write, answered by its process id, or
    the id of one that was told to end, answered by its exit status.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        if "ended" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["ended"], 0)[1]), flush=True)
            continue
        rank = os.fork()
        if not rank:
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number, file in ((0, os.open(asked["jobs"], os.O_RDONLY)), (1, log), (2, log)):
                os.dup2(file, number)
            break
        print(rank, flush=True)
    else:
        return
    with open(0) as lines:
        for line in lines:
            path, of_rank = line.rsplit(maxsplit=1)
            yield json.loads(Path(path).read_text()), int(of_rank)


def deliver(job: dict[str, Any], rank: int, result: Any) -> None:
    """The result of a job appears whole, by renaming."""
    part = Path(job["out"]) / f"rank{rank}.part"
    torch.save(result, part)
    part.rename(part.with_suffix(".pt"))


# -- what a test does --


class _Member:
    """A rank: its process, and where its jobs are written."""

    def __init__(self, pid: int, jobs: TextIO) -> None:
        self.process, self.jobs = psutil.Process(pid), jobs

    def has_ended(self) -> bool:
        """Until `Crew.close` asks for its exit status it is a zombie then."""
        return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE


class Crew:
    """Processes of one script that run job after job, each job on the first `world_size` of them.

    The script goes through `jobs()` and calls `deliver` for each. A process that ends or is late fails the
    job, and the next job starts with new processes.
    """

    def __init__(self, script: Path, logs: Path) -> None:
        self.script, self.logs = script, logs
        self.parent: subprocess.Popen[str] | None = None
        """Has imported what the script imports, and forks the members."""
        self.members: list[_Member] = []

    def run(self, folder: Path, job: dict[str, Any], world_size: int, timeout_s: float = 240.0) -> list[Any]:
        """What each rank saved.

        `job`, with "world_size", "port" and "out" added, passes through JSON in `folder`.

        AssertionError with the end of the failed ranks' output when one of them ends early or is late.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.json"
        path.write_text(
            json.dumps({**job, "world_size": world_size, "port": free_port(), "out": str(folder)})
        )
        for rank in range(len(self.members), world_size):
            self.members.append(self._fork(rank))
        ranks = self.members[:world_size]
        results = [folder / f"rank{rank}.pt" for rank in range(world_size)]
        assert not any(result.exists() for result in results), f"{folder} holds another job's results"
        for rank, member in enumerate(ranks):
            with contextlib.suppress(BrokenPipeError):  # it ended between jobs: said below
                member.jobs.write(f"{path} {rank}\n")
                member.jobs.flush()
        deadline = time.monotonic() + timeout_s
        while not all(result.exists() for result in results):
            ended = [rank for rank, member in enumerate(ranks) if member.has_ended()]
            if ended or time.monotonic() > deadline:
                late = [rank for rank, result in enumerate(results) if not result.exists()]
                self._kill()
                text = "\n".join(
                    f"--- rank {r}\n{self._log(r).read_text()[-6000:]}" for r in (ended or late)[:2]
                )
                raise AssertionError(f"{self.script.name} {'failed' if ended else 'is late'}:\n{text}")
            time.sleep(0.02)
        return [torch.load(result, weights_only=False) for result in results]

    def close(self) -> None:
        """Ends the processes, so that the next job gets new ones, which know nothing of the jobs so far.

        AssertionError, with the end of its output, for a process that does not end well by itself.
        """
        for member in self.members:
            member.jobs.close()
        for rank, member in enumerate(self.members):
            code = self._ask({"ended": member.process.pid}, 60)
            if code:
                self._kill()
                raise AssertionError(f"rank {rank} ended with {code}:\n{self._log(rank).read_text()[-3000:]}")
        self.members.clear()

    def end(self) -> None:
        """Closes it for good."""
        try:
            self.close()
        finally:
            self._kill()

    def _kill(self) -> None:
        """All of it, the parent too."""
        for member in self.members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.process.kill()
            with contextlib.suppress(BrokenPipeError):
                member.jobs.close()
        self.members.clear()
        if self.parent is not None:
            self.parent.kill()
            self.parent.communicate()
            self.parent = None

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def _fork(self, rank: int) -> _Member:
        if self.parent is None:
            self.parent = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(self.script)],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder) / "jobs"
            os.mkfifo(pipe)
            pid = self._ask({"jobs": str(pipe), "log": str(self._log(rank))}, 240)  # it may still import
            return _Member(pid, pipe.open("w"))  # opens once the rank has opened its end

    def _ask(self, request: dict[str, Any], timeout_s: float) -> int:
        """The parent's answer; -1 when it gives none."""
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        ready, _, _ = select.select([self.parent.stdout], [], [], timeout_s)
        return int((ready and self.parent.stdout.readline()) or -1)
