"""Where the time of a training step goes: collect, reward, old log-probs, update, sync, and the rest.

    python benchmarks/bench_step.py                            # the quickstart, as configured
    python benchmarks/bench_step.py --peer                     # the sizes at which TRL was measured (below)
    python benchmarks/bench_step.py -- objective=gspo_recompute steps=12

Each run is a `gspo train` of its own. Its first quarter (two steps at least) warms up and is not counted. The
table has means over the other steps, the line below it medians. Every second that is neither generation
(collect) nor learning (old log-probs, update) is counted in the last row.

--peer takes the model and the sizes of baselines/trl_step.py, which runs TRL (GSPO, HF generate): run both in
turn on a quiet machine. One optimiser step per batch, fp32, everything in one process. vLLM compiles its
model (rollout.enforce_eager=false, about 20 s once), as a long run would.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PARTS = ("collect", "reward", "pack", "old_logprobs", "update", "flips", "sync", "other")
LEARNING = ("collect", "old_logprobs", "update")
SIZES = ((8, 8, 32), (8, 8, 128), (16, 16, 32), (8, 8, 880))
"""Prompts, completions of each, limit in tokens. The random model ends a completion with probability 1/64 per
token, so a limit of 880 cuts none: it is 20 times the median, and the longest of 64 has about 6 medians."""


def measure(overrides: list[str], steps: int, threads: int | None) -> list[dict]:
    """Rows of a run of `steps` steps, without the first quarter."""
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ)
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        command = [
            sys.executable,
            "-m",
            "gspo_dist",
            "train",
            *overrides,
            f"steps={steps}",
            f"run_dir={folder}/run",
            "logger=quiet",
            "data.heldout=null",
            "checkpoint.save_last=false",
            "checkpoint.every=0",
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[1:])}\n{done.stdout}\n{done.stderr}")
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        memory = json.loads(Path(folder, "run", "summary.json").read_text())["peak_memory_bytes"]
    kept = [r for r in rows if "time/step_s" in r][max(2, steps // 4) :]
    for row in kept:
        row["memory"] = memory
    return kept


def median(rows: list[dict], key: str) -> float:
    """Of a metric over the counted steps."""
    return statistics.median(r[key] for r in rows)


def print_split(title: str, rows: list[dict]) -> None:
    """The table of a step's parts, and the medians below it."""
    step = median(rows, "time/step_s")
    means = {p: statistics.fmean(r.get(f"time/{p}_s", 0.0) for r in rows) for p in PARTS}
    whole = statistics.fmean(r["time/step_s"] for r in rows)
    print(f"\n## {title}\n\n| part | seconds | share |\n|---|---|---|")
    for part in PARTS:
        print(f"| {part} | {means[part]:.4f} | {means[part] / whole:.1%} |")
    rest = 1.0 - sum(means[p] for p in LEARNING) / whole
    print(f"| **neither generation nor learning** | {rest * whole:.4f} | {rest:.1%} |")
    print(
        f"\nstep {step:.3f} s (median of {len(rows)}), {median(rows, 'perf/tokens_per_s'):,.0f} completion "
        f"tokens/s end to end, {median(rows, 'perf/collect_tokens_per_s'):,.0f} while collecting; "
        f"check's share of the sync {median(rows, 'sync/check_fraction'):.1%}"
    )
    print(
        "peak resident memory: "
        + ", ".join(f"{name} {m['host'] / 2**20:,.0f} MiB" for name, m in rows[0]["memory"].items())
    )


def peer_overrides(prompts: int, group: int, tokens: int, threads: int) -> list[str]:
    """The settings that match baselines/trl_step.py."""
    return [
        "experiment=study",
        "model=peer",
        "learner.precision=fp32",
        "rollout.precision=fp32",
        "mini_batches=1",
        f"rollout.prompts_per_step={prompts}",
        f"rollout.group_size={group}",
        f"rollout.max_completion_tokens={tokens}",
        "rollout.max_prompt_tokens=16",
        f"learner.threads={threads}",
        f"rollout.threads={threads}",
        "flips.every=0",
        "learner.token_budget=65536",
        "rollout.weight_sync.probe_every=0",
        "rollout.enforce_eager=false",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="store_true", help="the sizes of the peer's measurement")
    parser.add_argument("--steps", type=int, default=16, help="steps of each run, warm-up included")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (--peer)")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of the sizes to run, from 0 (--peer)")
    parser.add_argument("--json", type=Path, help="also write the medians here")
    parser.add_argument("overrides", nargs="*", help="hydra overrides (default experiment=quickstart)")
    options = parser.parse_args()
    results = {}
    if options.peer:
        print(
            "| prompts x group x tokens | threads | completion tokens/s | step s | collect | update | sync |"
        )
        print("|---" * 7 + "|")
        for size in (SIZES[i] for i in options.sizes or range(len(SIZES))):
            for threads in options.threads:
                rows = measure([*peer_overrides(*size, threads), *options.overrides], options.steps, threads)
                name = " x ".join(map(str, size))
                results[f"{name}, {threads}"] = median(rows, "perf/tokens_per_s")
                seconds = [median(rows, f"time/{part}_s") for part in ("step", "collect", "update", "sync")]
                speed = f"{median(rows, 'perf/tokens_per_s'):,.0f}"
                cells = [name, str(threads), speed, *(f"{value:.3f}" for value in seconds)]
                print(f"| {' | '.join(cells)} |", flush=True)
    else:
        overrides = options.overrides or ["experiment=quickstart"]
        rows = measure(overrides, options.steps, None)
        print_split(" ".join(overrides), rows)
        results = {"tokens_per_s": median(rows, "perf/tokens_per_s"), "step_s": median(rows, "time/step_s")}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
