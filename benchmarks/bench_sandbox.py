"""Programs per second per core of the sandboxes of this host, and the overhead per run.

    python benchmarks/bench_sandbox.py --out benchmarks/reports/sandbox.md

Pinned to one core. A run is a fresh room for a program that prints 1, from opening to the end of all its
processes. The wall clock includes what other processes of the host took; CPU time does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gspo_dist.sandbox.local import LOCAL, refusal
from gspo_dist.sandbox.protocol import Limits, Program, Sandbox

TRIVIAL = Program("print(1)")


def fresh(sandbox: Sandbox, program: Program, runs: int) -> list[float]:
    """Seconds of each run in a room of its own."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        with sandbox.open(program, Limits()) as run:
            outcome = run.run("")
        seconds.append(time.perf_counter() - begun)
        assert outcome.stdout == "1\n", outcome
    return seconds


def within(sandbox: Sandbox, runs: int) -> list[float]:
    """Seconds of each further test of one program."""
    seconds = []
    with sandbox.open(TRIVIAL, Limits()) as run:
        for _ in range(runs):
            begun = time.perf_counter()
            assert run.run("").stdout == "1\n"
            seconds.append(time.perf_counter() - begun)
    return seconds


def bare(runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", "print(1)"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - begun)
    return seconds


def cpu_of_group(command: list[str], runs: int) -> float | None:
    """CPU ms per run, exactly, where a cgroup (version 1) may be made; None elsewhere."""
    group = Path(f"/sys/fs/cgroup/cpuacct/gspo-bench-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        return None
    try:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        def usage(count: int) -> int:
            before = int((group / "cpuacct.usage").read_text())
            subprocess.run([*command, str(count)], preexec_fn=enter, check=True, capture_output=True)
            time.sleep(0.3)  # what is killed last is counted a little later
            return int((group / "cpuacct.usage").read_text()) - before

        return (usage(2 * runs) - usage(runs)) / runs / 1e6
    finally:
        time.sleep(0.2)
        group.rmdir()


def row(name: str, seconds: list[float], base_ms: float, cpu_ms: float | None) -> str:
    ms = [1e3 * one for one in seconds]
    cpu = "" if cpu_ms is None else f"{cpu_ms:.1f}"
    per_cpu = "" if cpu_ms is None else f"{1e3 / cpu_ms:.0f}"
    return (
        f"| {name} | {1e3 / statistics.mean(ms):.0f} | {statistics.median(ms):.1f} | {max(ms):.0f} "
        f"| {statistics.median(ms) - base_ms:.1f} | {cpu} | {per_cpu} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=list(LOCAL), help="runs one sandbox and prints nothing")
    parser.add_argument("count", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    if arguments.only:
        fresh(LOCAL[arguments.only], TRIVIAL, arguments.count)
        return
    load = os.getloadavg()[0]
    base = bare(arguments.runs)
    base_ms = 1e3 * statistics.median(base)
    lines = [
        "# Throughput of the sandboxes",
        "",
        f"`python benchmarks/bench_sandbox.py --runs {arguments.runs}` on one core ({platform.machine()}, "
        f"Python {platform.python_version()}), load average {load:.1f} at the start.",
        "",
        "| a run | per second, wall | median ms | slowest ms | over bare ms | CPU ms | per CPU second |",
        "|---|---|---|---|---|---|---|",
        row("bare `python -I -S`, no sandbox", base, base_ms, None),
    ]
    for name in LOCAL:
        if why := refusal(name):
            lines.append(f"| {name} | this host: {why} | | | | | |")
            continue
        command = [sys.executable, str(Path(__file__)), "--only", name]
        cpu = cpu_of_group(command, arguments.runs)
        lines.append(row(name, fresh(LOCAL[name], TRIVIAL, arguments.runs), base_ms, cpu))
        lines.append(
            row(f"{name}, a further test of one program", within(LOCAL[name], arguments.runs), base_ms, None)
        )
    lines += [
        "",
        "CPU ms: of all processes of a run, from a cgroup of their own; load raises it less than the wall.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
