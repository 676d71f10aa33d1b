"""The cost of every objective on a CPU: milliseconds of loss, statistics and backward.

    python benchmarks/bench_objectives.py --tokens 1000000 --threads 1

Sequences have ragged lengths, as in a packed batch. Prints a Markdown table. "/ GRPO" is the ratio to GRPO in
the same run; rounds are interleaved, so that a busy machine slows all alike. "floor" is a sum over x * x with
its backward: the price of touching the numbers twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from gspo_dist.objectives import OBJECTIVES, Denominators, Segments, get_objective

LONGEST = 4096


def ragged_lengths(tokens: int, seed: int) -> list[int]:
    """Lengths uniform in [1, 4096], the last one cut so that they add up to `tokens`."""
    rng = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    left = tokens
    while left:
        lengths.append(min(left, int(torch.randint(1, LONGEST + 1, (1,), generator=rng))))
        left -= lengths[-1]
    return lengths


def cases(tokens: int) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward."""
    lengths = ragged_lengths(tokens, seed=0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    segments = Segments(ids, len(lengths))
    denominators = Denominators(len(lengths), tokens, LONGEST)
    rng = torch.Generator().manual_seed(1)
    old = -2 * torch.rand(tokens, generator=rng)
    logprobs = (old + 0.05 * torch.randn(tokens, generator=rng)).requires_grad_()
    advantages = segments.expand(torch.randn(len(lengths), generator=rng))

    def floor() -> None:
        logprobs.grad = None
        (logprobs * logprobs).sum().backward()

    def case(name: str) -> Callable[[], None]:
        objective = get_objective(name)
        # m2po's cut, rspo's shift and the mean score are found outside of the loss.
        reads = {
            "second_moment_cut": 0.05,
            "router_shift": torch.full_like(old, 0.9),
            "expected_score": torch.full_like(old, -1.0),
        }
        extra = {name: reads[name] for name in objective.spec.reads}

        def run() -> None:
            logprobs.grad = None
            objective.loss(logprobs, old, advantages, segments, denominators, extra=extra).loss.backward()

        return run

    return {"floor": floor, **{name: case(name) for name in OBJECTIVES}}


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, after one warm-up; rounds are interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_index:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def table(times: dict[str, list[float]], tokens: int) -> str:
    """Median, minimum, ratio of medians to GRPO and tokens per second."""
    grpo = statistics.median(times["grpo"])
    lines = ["| objective | median ms | min ms | / GRPO | M tokens/s |", "|---|---:|---:|---:|---:|"]
    for name, values in times.items():
        median = statistics.median(values)
        speed = tokens / median / 1e3
        lines.append(f"| {name} | {median:.1f} | {min(values):.1f} | {median / grpo:.2f} | {speed:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="trained tokens")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    args = parser.parse_args()
    for name in ("tokens", "threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1: got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    times = measure(cases(args.tokens), args.rounds)
    print(
        f"{args.tokens:,} trained tokens, float32, {args.threads} thread(s), {args.rounds} rounds, "
        f"torch {torch.__version__}\n"
    )
    print(table(times, args.tokens))


if __name__ == "__main__":
    main()
