"""Runs one script as several ranks and returns what each of them saved: real processes, no pytest inside
them."""

from __future__ import annotations

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


def run_ranks(script: Path, job: dict[str, Any], world_size: int, timeout_s: float = 540.0) -> list[Any]:
    """Calls `python script JOB.pt RANK` for every rank; the script saves its result to
    job["out"]/rank{RANK}.pt.

    The job reaches the ranks through torch.save and gets "world_size", "port" and "out". AssertionError with
    the end of every rank's output when one of them fails; the others are then killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.save({**job, "world_size": world_size, "port": free_port(), "out": folder}, out / "job.pt")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        logs = [(out / f"log{rank}.txt").open("w+") for rank in range(world_size)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(out / "job.pt"), str(rank)], env=env, stdout=log, stderr=log
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
