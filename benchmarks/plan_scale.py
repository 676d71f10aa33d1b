"""One run from 8 to 4,096 GPUs: what a step takes, who waits, what failures cost, where each design breaks.

    python benchmarks/plan_scale.py --report benchmarks/reports/scale.md

Qwen3-30B-A3B on H100s, half of the GPUs learn, engines of four GPUs, one step ahead. The batch grows with
the cluster (64 completions per GPU), so that a design that scales takes as long at every size. Steps come
from the planner's clock and its discrete-event simulation. The limits of single processes are held against
them:

    exporter       one rank's network card sends all weights; engines get them in a tree, or one by one
    driver         every process is called for every slice of sampling, update and publication
                   (seconds per call: benchmarks/bench_driver.py)
    object store   all completions of a step pass one host's, with routing traces or without

A second simulation goes through failures, drawn at a given rate for each GPU: an engine's costs what it was
sampling, a rank's costs the way back to the newest checkpoint.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

from gspo_dist.config import LearnerConfig, MegatronConfig, RolloutConfig, RunConfig
from gspo_dist.models.shape import find_model
from gspo_dist.planner.ahead import draw, machine_of, steps_needed, steps_of
from gspo_dist.planner.calibration import ASSUMPTIONS
from gspo_dist.planner.hardware import find_gpu
from gspo_dist.planner.layout import read_run
from gspo_dist.planner.memory import checkpoint_bytes, engine_memory
from gspo_dist.planner.throughput import step_time, sync_s

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPLETIONS_PER_GPU, GROUP, TENSOR = 64, 16, 4
CALL_S = 0.0006
"""Driver's processor seconds of one call to one process (benchmarks/bench_driver.py)."""
SLICE_S = 0.25
"""Seconds of sampling between two answers of an engine (gspo_dist/trainer/clockwork.py)."""
STORE_GB_S, SPILLED_GB_S = 2.0, 0.117
"""What an object store takes in from other hosts while it holds it, and once it spills to a disk."""
STORE_GIB = 64
"""Memory of that store."""
GPU_HOURS_PER_FAILURE = 50_000.0
"""16,384 H100s failed 419 times in 54 days (Llama 3, arXiv 2407.21783, section 3.3.4): one in 50,700 h."""
STARTING_S, ENGINE_STARTING_S = 300.0, 120.0
"""Processes of a learner, and of an engine, until they are ready. Assumed."""
STORAGE_GB_S = 100.0
"""What the shared file system reads and writes in all, at most. Assumed."""
NOTICED = 0.1
"""A part is a limit from this share of a step on."""


@dataclass(frozen=True)
class Size:
    """What one size of the cluster comes to. Seconds per step."""

    gpus: int
    step_s: float
    """Simulated, without the limits below."""
    engine_idle: float
    learner_idle: float
    publish_s: float
    """One card sends, engines get it in a tree."""
    star_s: float
    """The same where each engine is sent to on its own."""
    driver_s: float
    store_s: float
    """Completions through one object store."""
    traces_s: float
    """The same with a routing trace of every token."""
    checkpoint_s: float
    lost: float
    """Share of the time that failures cost."""
    interval: int
    """Steps between two checkpoints with which that share is smallest."""


def run_of(gpus: int) -> RunConfig:
    """Half of the GPUs learn."""
    ranks = gpus // 2
    return RunConfig(
        mini_batches=4,
        learner=LearnerConfig(
            backend="megatron",
            world_size=ranks,
            token_budget=20480,
            precision="bf16",
            megatron=MegatronConfig(
                expert_parallel=min(8, ranks), recompute="full", optimizer_cpu_offload=ranks < 16
            ),
        ),
        rollout=RolloutConfig(
            engines=max(1, (gpus - ranks) // TENSOR),
            tensor_parallel=min(TENSOR, gpus - ranks),
            prompts_per_step=gpus * COMPLETIONS_PER_GPU // GROUP,
            group_size=GROUP,
            max_prompt_tokens=2048,
            max_completion_tokens=8192,
            precision="bf16",
            steps_ahead=1,
        ),
    )


def look(gpus: int, call_s: float = CALL_S, hours: float = GPU_HOURS_PER_FAILURE) -> Size:
    """One size of the cluster."""
    run = run_of(gpus)
    model, gpu = find_model("Qwen3-30B-A3B"), find_gpu("H100")
    learner, engine, work = read_run(run)
    places = engine_memory(model, engine, work, gpu.memory).decoded
    time = step_time(model, learner, engine, work, gpu, places)
    machine = machine_of(model, engine, work, gpu, places, time, ASSUMPTIONS)
    outcome = steps_of(machine, draw(work.lengths, work, steps_needed(work, 1)), work, 1)
    card = sync_s(model, learner, gpu, ASSUMPTIONS)
    slices = outcome.step_s / SLICE_S
    calls = engine.engines * (slices + 2) + learner.world_size * (run.mini_batches + 1)
    hosts = -(-learner.world_size // gpu.gpus_per_node)
    written = checkpoint_bytes(model, learner) / (min(STORAGE_GB_S, hosts * run.plan.storage_gb_s) * 1e9)
    interval, lost = best_interval(outcome.step_s, gpus, written, hours)
    return Size(
        gpus,
        outcome.step_s,
        outcome.engine_idle,
        outcome.learner_idle,
        card + math.log2(engine.engines + 1) * 0.001,
        card * engine.engines,
        calls * call_s,
        stored_s(work.tokens * 12),
        stored_s(work.tokens * (12 + model.trace_bytes_per_token)),
        written,
        lost,
        interval,
    )


def stored_s(size: float) -> float:
    """Seconds for so many bytes through one store: what it cannot hold goes over its disk."""
    held = min(size, STORE_GIB * 2**30)
    return held / (STORE_GB_S * 1e9) + (size - held) / (SPILLED_GB_S * 1e9)


def with_failures(
    step_s: float, gpus: int, written_s: float, every: int, hours: float, *, steps: int = 4000, seed: int = 0
) -> float:
    """Share of the time that failures and checkpoints cost, over a simulated run of so many steps.

    Half of the failures are of ranks: the run starts again, reads its checkpoint, and repeats what came after
    it. Half are of engines: the others go on with the work, and the step is longer by the engine's share.
    """
    rng, now, done, saved = random.Random(seed), 0.0, 0, 0
    rate, engines = gpus / (hours * 3600.0), max(1, gpus // 2 // TENSOR)
    failure = now + rng.expovariate(rate)
    while done < steps:
        now += step_s
        if now > failure:
            failure = now + rng.expovariate(rate)
            if rng.random() < 0.5:
                now += STARTING_S + written_s
                done = saved
                continue
            now += min(step_s, ENGINE_STARTING_S) / engines
        done += 1
        if done % every == 0:
            now += written_s
            saved = done
        if now > 50 * steps * step_s:  # it never gets on
            return 1.0
    return 1.0 - steps * step_s / now


def best_interval(step_s: float, gpus: int, written_s: float, hours: float) -> tuple[int, float]:
    """(steps between checkpoints, share lost) with the smallest loss."""
    options = {n: with_failures(step_s, gpus, written_s, n, hours) for n in (1, 2, 5, 10, 25, 50)}
    best = min(options, key=lambda n: options[n])
    return best, options[best]


def breaks(sizes: list[Size]) -> list[tuple[str, str]]:
    """(design, the first size at which it takes more than a tenth of a step)."""
    parts = {
        "one exporter, engines in a tree": lambda s: s.publish_s,
        "one exporter, engines one by one": lambda s: s.star_s,
        "one driver that calls every process": lambda s: s.driver_s,
        "one object store, tokens and log-probs": lambda s: s.store_s,
        "one object store, routing traces too": lambda s: s.traces_s,
        "checkpoints and failures, learner as one unit": lambda s: s.lost * s.step_s,
    }
    out = []
    for name, part in parts.items():
        first = next((s for s in sizes if part(s) > NOTICED * s.step_s), None)
        last = sizes[-1]
        share = f"{part(last) / last.step_s:.0%} of a step at {last.gpus:,} GPUs"
        out.append((name, f"{first.gpus:,} GPUs; {share}" if first else f"not up to {last.gpus:,}; {share}"))
    return out


def figure(sizes: list[Size], path: Path) -> None:
    """Seconds per step of every part, over the size of the cluster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawn)
    axis = drawn.subplots()
    x = [s.gpus for s in sizes]
    lines = {
        "step (simulated)": [s.step_s for s in sizes],
        "publication, tree": [s.publish_s for s in sizes],
        "publication, one by one": [s.star_s for s in sizes],
        "driver": [s.driver_s for s in sizes],
        "object store": [s.store_s for s in sizes],
        "object store with traces": [s.traces_s for s in sizes],
        "lost to failures": [s.lost * s.step_s for s in sizes],
    }
    for name, y in lines.items():
        axis.plot(x, y, marker="o", markersize=3, linewidth=2.0 if "step" in name else 1.2, label=name)
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="seconds per step")
    axis.set_xticks(x, [f"{n:,}" for n in x], rotation=45)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    drawn.savefig(path, dpi=110, format="png")


def report(sizes: list[Size], picture: str, command: str) -> str:
    lines = [
        "# From 8 to 4,096 GPUs, simulated",
        "",
        f"Made by `{command}`.",
        "No cluster has run this. Every number is the planner's, or an assumption that the script names:",
        "[how far the planner is from published runs](planner.md).",
        "",
        "Qwen3-30B-A3B, H100, half of the GPUs learn, engines of 4 GPUs, one step ahead, 64 completions of",
        "4,096 tokens (mean) per GPU. Failures: one in 50,000 GPU hours.",
        "",
        f"![seconds per step]({picture})",
        "",
        "| GPUs | step s | engines idle | learner idle | publication s: tree | one by one | driver s | "
        "store s | with traces | checkpoint s | every | lost |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for s in sizes:
        lines.append(
            f"| {s.gpus:,} | {s.step_s:.0f} | {s.engine_idle:.0%} | {s.learner_idle:.0%} | "
            f"{s.publish_s:.1f} | {s.star_s:.0f} | {s.driver_s:.1f} | {s.store_s:.1f} | {s.traces_s:.1f} | "
            f"{s.checkpoint_s:.0f} | {s.interval} | {s.lost:.1%} |"
        )
    lines += ["", '"Every" is the number of steps between two checkpoints that loses least.', ""]
    lines += ["## Where each design breaks: a tenth of a step", "", "| design | from |", "|---|---|"]
    lines += [f"| {name} | {where} |" for name, where in breaks(sizes)]
    lines += [
        "",
        "The driver's seconds are calls times what one was measured to cost ([driver.md](driver.md)). It",
        "asks every engine four times a second: its share says by how much slices must be longer. Traces",
        "break the store because what it cannot hold goes over a disk.",
        "",
        "The simulation knows no network that is shared with others, no stragglers among ranks, and no",
        "second failure while a run recovers.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="write the page here, and its figure beside it")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="GPUs of the largest cluster")
    args = parser.parse_args()
    sizes = []
    for gpus in SIZES:
        if gpus <= args.largest:
            sizes.append(look(gpus))
            print(replace(sizes[-1]), flush=True)
    for name, where in breaks(sizes):
        print(f"{name}: {where}")
    if args.report:
        picture = args.report.with_suffix(".png")
        figure(sizes, picture)
        command = f"python benchmarks/plan_scale.py --report benchmarks/reports/{args.report.name}"
        args.report.write_text(report(sizes, picture.name, command))


if __name__ == "__main__":
    main()
