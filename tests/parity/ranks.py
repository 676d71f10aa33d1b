"""Runs one script as several ranks and returns what each of them saved.

The ranks are real processes without pytest inside them. `run_ranks` starts processes for one job. A
`Crew` keeps its processes for the next job, because importing the libraries takes several times as long
as a tiny job.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
    """Calls `python script JOB.pt RANK` for every rank and returns what each saved to
    job["out"]/rank{RANK}.pt.

    The job reaches the ranks through torch.save and gets "world_size", "port" and "out". When a rank fails,
    the others are killed, and AssertionError has the end of every rank's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.save({**job, "world_size": world_size, "port": free_port(), "out": folder}, out / "job.pt")
        logs = [(out / f"log{rank}.txt").open("w+") for rank in range(world_size)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(out / "job.pt"), str(rank)],
                env=_environment(),
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                if any(p.poll() for p in processes):
                    break
                time.sleep(0.1)
        finally:
            late = [p for p in processes if p.poll() is None]
            for p in late:
                p.kill()
                p.wait()
            for log in logs:
                log.close()
        if any(p.returncode for p in processes):
            text = "\n".join(
                f"--- rank {r} (exit {p.returncode})\n{(out / f'log{r}.txt').read_text()[-6000:]}"
                for r, p in enumerate(processes)
            )
            raise AssertionError(f"{script.name} failed{' (timeout)' if late else ''}:\n{text}")
        return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


class Crew:
    """Processes of one script that run job after job, each job on the first `world_size` of them.

    The script reads lines "JOB.json RANK". For each it puts its result at job["out"]/rank{RANK}.pt,
    by renaming a finished file. A process that ends or is late fails the job, and the next job
    starts with new processes.
    """

    def __init__(self, script: Path, logs: Path) -> None:
        self.script, self.logs = script, logs
        self.members: list[subprocess.Popen[str]] = []

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
        self._start(world_size)
        ranks = self.members[:world_size]
        results = [folder / f"rank{rank}.pt" for rank in range(world_size)]
        assert not any(result.exists() for result in results), f"{folder} holds another job's results"
        for rank, member in enumerate(ranks):
            with contextlib.suppress(BrokenPipeError):  # it ended between jobs: said below
                member.stdin.write(f"{path} {rank}\n")
                member.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while not all(result.exists() for result in results):
            ended = [rank for rank, member in enumerate(ranks) if member.poll() is not None]
            if ended or time.monotonic() > deadline:
                late = [rank for rank, result in enumerate(results) if not result.exists()]
                self._kill()
                text = "\n".join(
                    f"--- rank {r}\n{self._log(r).read_text()[-3000:]}" for r in (ended or late)[:2]
                )
                raise AssertionError(f"{self.script.name} {'failed' if ended else 'is late'}:\n{text}")
            time.sleep(0.02)
        return [torch.load(result, weights_only=False) for result in results]

    def close(self) -> None:
        """Ends the processes, so that the next job gets new ones, which know nothing of the jobs so far.

        AssertionError, with the end of its output, for a process that does not end well by itself.
        """
        for member in self.members:
            member.stdin.close()
        try:
            for rank, member in enumerate(self.members):
                code = member.wait(timeout=60)
                assert code == 0, f"rank {rank} ended with {code}:\n{self._log(rank).read_text()[-3000:]}"
        finally:
            self._kill()

    def _kill(self) -> None:
        for member in self.members:
            member.kill()
        for member in self.members:
            member.wait()
        self.members.clear()

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def _start(self, world_size: int) -> None:
        for rank in range(len(self.members), world_size):
            with self._log(rank).open("w") as log:
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", str(self.script)],
                        env=_environment(),
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        text=True,
                    )
                )
