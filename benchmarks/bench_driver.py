"""What the driver itself costs: seconds per step and per publication, with stub engines and learner ranks.

    python benchmarks/bench_driver.py --actors 1,8,64,512x8 --report benchmarks/reports/driver.md

Every stub is a real Ray actor in a process of its own that only sleeps. Half of a number are engines, half
are ranks (one of each for 1). A step is what the trainer's loop asks of them: slices of sampling from every
engine, one update of every rank per mini-batch. A publication is start at the engines, send at the ranks,
finish at the engines. All calls go through gspo_dist/actors/process.py, as a run's do.

512x8 is 512 stubs, eight of which are threads of one process: where memory holds no more processes, the
driver still sends and gathers as many calls. The report names such rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_dist.actors.process import Actors

WAIT_S = 300.0


@dataclass(frozen=True)
class Cost:
    """One measured size."""

    engines: int
    ranks: int
    processes: int
    start_s: float
    """Until every process had answered once."""
    step_s: float
    """Wall seconds of a step beyond what its stubs sleep, the median."""
    step_cpu_s: float
    """The driver's own processor seconds in it."""
    publish_s: float
    """The same of a publication."""
    publish_cpu_s: float


def stub_class() -> Any:
    """The actor: it sleeps, and answers with so many bytes."""
    import ray

    @ray.remote(num_cpus=0)
    class Stub:
        def work(self, seconds: float, answer_bytes: int) -> bytes:
            time.sleep(seconds)
            return bytes(answer_bytes)

    return Stub


def measure(count: int, each: int, args: argparse.Namespace) -> Cost:
    """Starts `count` stubs (2 for 1), `each` to a process, asks for `args.steps` steps, takes the medians."""
    engines, ranks = max(1, count // 2), max(1, count // 2)
    stub, logs = stub_class(), Path(tempfile.gettempdir())
    began = time.perf_counter()
    processes = [
        stub.options(max_concurrency=each).remote() for _ in range(max(2, -(-(engines + ranks) // each)))
    ]
    # The n-th engine and rank live in the n-th process, over and over.
    dealt = [processes[i % len(processes)] for i in range(engines + ranks)]
    sampling = Actors({f"engine {i}": handle for i, handle in enumerate(dealt[:engines])}, logs)
    learning = Actors({f"rank {i}": handle for i, handle in enumerate(dealt[engines:])}, logs)

    def ask(actors: Actors, answer_bytes: int = 64) -> None:
        actors.call_all("work", args.sleep, answer_bytes, timeout=WAIT_S)

    ask(sampling)
    ask(learning)
    started = time.perf_counter() - began
    steps, publications = [], []
    for _ in range(args.steps):
        steps.append(
            _clocked(lambda: _step(ask, sampling, learning, args), args.slices + args.mini_batches, args)
        )
        publications.append(_clocked(lambda: _publish(ask, sampling, learning), 3, args))
    for process in processes:
        _end(process)
    wall, cpu = zip(*steps, strict=True)
    sent, sent_cpu = zip(*publications, strict=True)
    return Cost(
        engines,
        ranks,
        len(processes),
        started,
        statistics.median(wall),
        statistics.median(cpu),
        statistics.median(sent),
        statistics.median(sent_cpu),
    )


def _step(ask: Any, sampling: Actors, learning: Actors, args: argparse.Namespace) -> None:
    for _ in range(args.slices):
        ask(sampling, args.answer_kib << 10)
    for _ in range(args.mini_batches):
        ask(learning)


def _publish(ask: Any, sampling: Actors, learning: Actors) -> None:
    ask(sampling)
    ask(learning)
    ask(sampling)


def _clocked(work: Any, calls: int, args: argparse.Namespace) -> tuple[float, float]:
    """(wall seconds beyond the sleep of `calls` calls, processor seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall - calls * args.sleep, time.process_time() - cpu


def _end(actor: Any) -> None:
    import ray

    ray.kill(actor)


def report(costs: list[Cost], args: argparse.Namespace, command: str) -> str:
    lines = [
        "# What the driver costs",
        "",
        f"Made by `{command}` on {os.cpu_count()} cores that other work kept busy: the processor",
        "seconds of the driver say more than the wall seconds.",
        "",
        f"A step is {args.slices} slices of sampling (each engine answers with {args.answer_kib} KiB) and",
        f"{args.mini_batches} updates. A publication is three calls. Stubs sleep {args.sleep * 1e3:g} ms,",
        f"which is taken off. Medians of {args.steps} steps.",
        "",
        "| engines + ranks | processes | started in s | step s | its CPU s | publication s | its CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in costs:
        shared = (
            ""
            if c.processes >= c.engines + c.ranks
            else f" ({-(-(c.engines + c.ranks) // c.processes)} threads each)"
        )
        lines.append(
            f"| {c.engines} + {c.ranks} | {c.processes}{shared} | {c.start_s:.1f} | {c.step_s:.3f} | "
            f"{c.step_cpu_s:.3f} | {c.publish_s:.3f} | {c.publish_cpu_s:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--actors", default="1,8,64", help="stubs, and x threads of one process: 8,64,512x8")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--slices", type=int, default=20, help="slices of sampling in a step")
    parser.add_argument("--mini-batches", type=int, default=4)
    parser.add_argument("--sleep", type=float, default=0.01, help="seconds that a stub sleeps")
    parser.add_argument("--answer-kib", type=int, default=64, help="what an engine answers to a slice")
    parser.add_argument("--report", type=Path, help="write the page here")
    args = parser.parse_args()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20)
    costs = []
    try:
        for word in args.actors.split(","):
            count, _, each = word.partition("x")
            costs.append(measure(int(count), int(each or 1), args))
            print(costs[-1], flush=True)
    finally:
        ray.shutdown()
    if args.report:
        command = f"python benchmarks/bench_driver.py --actors {args.actors}"
        args.report.write_text(report(costs, args, command))


if __name__ == "__main__":
    main()
