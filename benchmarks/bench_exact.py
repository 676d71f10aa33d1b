"""`learner.consistency=exact` by the token and by the second: what is equal, and what it costs.

    python benchmarks/bench_exact.py                                  # all cases, minutes
    python benchmarks/bench_exact.py --only quickstart --threads 1    # one model on one thread
    python benchmarks/bench_exact.py --report benchmarks/reports/exactness.md

Each case is one model, one precision and one number of threads, in a process of its own. A real vLLM engine
samples completions of random prompts at temperature 1. Two learners of the same weights, `off` and `exact`,
give the log-probs of the same tokens, packed into one batch and each sequence alone. Compared are bits.

The exit status is 1 where a log-prob of `exact` differs from the engine's, packed or alone, or where its
gradient in fp32 is further than 1e-5 (relative norm) from the one of `off`.

Seconds are medians of `--repeats` runs in one process, the two learners by turns. Their ratio is what counts:
the machine may be shared. It needs vllm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_dist.coldstart.recipes import Shape

MODELS = {
    "quickstart": Shape(),
    "wide": Shape(hidden=512, heads=8, experts=16, top_k=4, expert_hidden=128),
    "dense heads": Shape(layers=2, heads=8, kv_heads=1, head_dim=64, experts=4, top_k=1, expert_hidden=256),
}
"""Random weights: `quickstart` has the sizes of the quickstart's model."""
RESULT = "RESULT "
SEQUENCES, NEW_TOKENS = 24, 96
GRADIENT_LIMIT = 1e-5


def prepare(folder: Path, shape: Shape) -> None:
    from gspo_dist.coldstart.model import build_model, save_model
    from gspo_dist.coldstart.tokenizer import build_tokenizer

    save_model(build_model(shape, seed=0), folder)
    build_tokenizer().save_pretrained(folder)


def measure(folder: Path, precision: str, threads: int, repeats: int) -> dict[str, Any]:
    """One case. Runs in a process of its own, since vLLM reads its settings once. Without repeats nothing is
    timed.
    """
    from gspo_dist.config import RolloutConfig
    from gspo_dist.learners.hf_model import load_policy
    from gspo_dist.rollout.vllm.engine import VllmEngine, prepare_process
    from gspo_dist.types import Prompt, SamplingSpec

    prepare_process("cpu", threads, precision)
    torch.set_num_threads(threads)
    fp32_head = precision == "fp32"
    learners = {
        consistency: load_policy(folder, precision, fp32_head=fp32_head, consistency=consistency)
        for consistency in ("off", "exact")
    }
    config = RolloutConfig(
        precision=precision,
        max_prompt_tokens=64,
        max_completion_tokens=NEW_TOKENS,
        enforce_eager=True,
        kv_cache_gib=0.25,
    )
    engine = VllmEngine(config, folder, threads=threads, batch_invariant=True, fp32_head=fp32_head)
    rng = np.random.default_rng(0)
    vocabulary = learners["off"].hf.config.vocab_size
    asked = [
        Prompt(str(i), tuple(rng.integers(4, vocabulary, rng.integers(3, 60)).tolist()), "")
        for i in range(SEQUENCES)
    ]
    groups = engine.generate(asked, SamplingSpec(n=1, max_tokens=NEW_TOKENS, seed=1), range(SEQUENCES))
    sampled = [group[0] for group in groups]
    sequences = [np.concatenate([p.token_ids, c.token_ids]) for p, c in zip(asked, sampled, strict=True)]
    starts = [len(p.token_ids) for p in asked]
    recorded = np.concatenate([c.logprobs for c in sampled])
    read = np.concatenate(
        [lp[start - 1 :] for lp, start in zip(engine.logprobs_of(sequences), starts, strict=True)]
    )
    engine.close()

    result: dict[str, Any] = {
        "tokens": len(recorded),
        "prefill": int((read == recorded).sum()),
        "learners": {},
    }
    gradients = {}
    for name, policy in learners.items():
        with torch.no_grad():
            packed = policy(**inputs(sequences, starts))[0].numpy()
            alone = np.concatenate(
                [policy(**inputs([s], [at]))[0].numpy() for s, at in zip(sequences, starts, strict=True)]
            )
        policy(**inputs(sequences, starts))[0].mean().backward()
        gradients[name] = torch.cat([p.grad.flatten().double() for p in policy.parameters()])
        distance = np.abs(packed.astype(np.float64) - recorded)
        result["learners"][name] = {
            "packed": int((packed == recorded).sum()),
            "alone": int((alone == recorded).sum()),
            "mean": float(distance.mean()),
            "max": float(distance.max()),
        }
    apart = (gradients["exact"] - gradients["off"]).norm() / gradients["off"].norm()
    result["gradient"] = float(apart)

    def forward(name: str) -> None:
        with torch.no_grad():
            learners[name](**inputs(sequences, starts))

    def update(name: str) -> None:
        learners[name](**inputs(sequences, starts))[0].mean().backward()

    for kind, work in (("forward", forward), ("update", update)) if repeats else ():
        for name, seconds in by_turns(work, tuple(learners), repeats).items():
            result["learners"][name][kind] = seconds
    return result


def inputs(sequences: list[np.ndarray], starts: list[int]) -> dict[str, torch.Tensor]:
    """The sequences laid end to end; wanted are the log-probs of what comes after each one's start."""
    lengths = [len(s) for s in sequences]
    ends = np.cumsum(lengths)
    index = [np.arange(end - n + at, end) for end, n, at in zip(ends, lengths, starts, strict=True)]
    return {
        "token_ids": torch.from_numpy(np.concatenate(sequences)).long(),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        "cu_seqlens": torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        "index": torch.from_numpy(np.concatenate(index)),
    }


def by_turns(work: Callable[[str], None], names: tuple[str, ...], repeats: int) -> dict[str, float]:
    """The median seconds of each, run alternately."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        work(name)
    for _ in range(repeats):
        for name in names:
            began = time.perf_counter()
            work(name)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def wrong(precision: str, case: dict[str, Any]) -> list[str]:
    """What does not hold of a case."""
    exact, tokens = case["learners"]["exact"], case["tokens"]
    found = [
        f"{exact[how]} of {tokens} tokens equal, {how}" for how in ("packed", "alone") if exact[how] != tokens
    ]
    if precision == "fp32" and case["gradient"] > GRADIENT_LIMIT:
        found.append(f"the gradient is {case['gradient']:.1e} away")
    return found


def report(cases: list[tuple[str, str, int, dict[str, Any]]], command: str) -> str:
    lines = [
        "# One number on both sides",
        "",
        f"`{command}` on {processor()}, torch {torch.__version__}.",
        f"Every case samples {SEQUENCES} completions of up to {NEW_TOKENS} tokens. "
        "The models have random weights. Other [model families](exactness_families.md) have a page of their "
        "own.",
        "",
        *(
            f"- {name}: {s.layers} layers of {s.hidden}, {s.heads}/{s.kv_heads} heads of {s.head_dim}, "
            f"{s.experts} experts top-{s.top_k}"
            for name, s in MODELS.items()
        ),
        "",
        "Tokens whose log-prob is the engine's, bit for bit. `prefill`: the engine itself, when it reads the",
        "sequence at once. `mean` and `max`: what the learner differs by without it (`off`), in nats.",
        "",
        "| model | precision | threads | tokens | prefill | off | off: mean | off: max | exact, packed | "
        "exact, alone |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, precision, threads, case in cases:
        off, exact = case["learners"]["off"], case["learners"]["exact"]
        lines.append(
            f"| {model} | {precision} | {threads} | {case['tokens']} | {case['prefill']} | {off['packed']} | "
            f"{off['mean']:.1e} | {off['max']:.1e} | {exact['packed']} | {exact['alone']} |"
        )
    lines += [
        "",
        "What it costs: seconds of `exact` over seconds of `off`, of a forward pass without gradients and of",
        "forward and backward. `gradient`: the relative distance of the two gradients. In bf16 the forwards",
        "differ, in some routes too, and so do their gradients.",
        "",
        "| model | precision | threads | forward | forward + backward | gradient |",
        "|---|---|---|---|---|---|",
    ]
    for model, precision, threads, case in cases:
        off, exact = case["learners"]["off"], case["learners"]["exact"]
        lines.append(
            f"| {model} | {precision} | {threads} | {exact['forward'] / off['forward']:.2f} | "
            f"{exact['update'] / off['update']:.2f} | {case['gradient']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def run_case(folder: Path, precision: str, threads: int, repeats: int) -> dict[str, Any]:
    case = json.dumps({"precision": precision, "threads": threads, "repeats": repeats})
    done = subprocess.run(
        [sys.executable, __file__, "--case", str(folder), case],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode != 0 or not told:
        raise SystemExit(
            f"the case {folder.name} {case} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return json.loads(told[-1].removeprefix(RESULT))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="MODEL")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", type=Path, help="a Markdown file")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(RESULT + json.dumps(measure(Path(args.case[0]), **json.loads(args.case[1]))), flush=True)
        os._exit(0)  # vLLM's threads would hold the process
    cases, bad = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.only:
            folder = Path(scratch) / model
            prepare(folder, MODELS[model])
            for precision in args.precision:
                for threads in args.threads:
                    case = run_case(folder, precision, threads, args.repeats)
                    cases.append((model, precision, threads, case))
                    bad += [f"{model}, {precision}, {threads} threads: {x}" for x in wrong(precision, case)]
                    exact = case["learners"]["exact"]
                    print(f"{model}, {precision}, threads {threads}: {exact['packed']} of {case['tokens']}")
    text = report(cases, " ".join(["python benchmarks/bench_exact.py", *sys.argv[1:]]))
    print(text)
    if args.report:
        args.report.write_text(text)
    for line in bad:
        print(f"WRONG: {line}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
