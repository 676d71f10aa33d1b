"""What rollouts begun ahead gain by wall time, and what driving engines in slices costs.

    python benchmarks/bench_async.py             # K = 0, 1, 2, 4 on long-tailed lengths, simulated decoding
    python benchmarks/bench_async.py --slices    # vLLM in slices against one blocking call, on a CPU
    python benchmarks/bench_async.py --real      # gspo train on the quickstart, real decoding and learning

The first measures the pipeline itself: the real collector, the real pool, two engines in processes of their
own under Ray, a thread beside the learner, a publication between steps. **Simulated** is the work: a decode
step of n sequences takes tick + per_sequence * n seconds of sleep in the reference engine, and the learner
sleeps for its seconds. So two cores are enough for three parties, and the result is not a statement about any
GPU. Lengths are lognormal, with the limit at 20 times the median. The same numbers go into the planner's
model (gspo_dist/planner/pipeline.py), on the lengths that came out: the last column is what it predicts.

--real runs two vLLM engines and two DeepSpeed ranks. On a host with fewer cores than that they take time from
each other, and nothing can be gained: the table then says what K costs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gspo_dist.config import RolloutConfig
from gspo_dist.planner.pipeline import Machine, simulate
from gspo_dist.rollout.engine import group_work
from gspo_dist.rollout.reference import ReferenceEngine, Rows
from gspo_dist.rollout.seeds import uniforms
from gspo_dist.types import Prompt, Rollout, SamplingSpec

PROMPT = 3
"""Tokens of a prompt."""
VOCABULARY = 1000
"""The first sampled token tells siblings apart: it decides how long a completion gets."""


@dataclass(frozen=True)
class Case:
    """What is simulated. Seconds."""

    engines: int = 2
    """Engines, each in a process of its own."""
    prompts: int = 16
    """Prompts per step."""
    group: int = 4
    """Completions per prompt."""
    median: int = 16
    """Median length of a completion, in tokens."""
    spread: float = 1.2
    """Standard deviation of the logarithm of the length."""
    tick_s: float = 0.02
    """A decode step without its sequences."""
    per_sequence_s: float = 0.0004
    """What each sequence adds to a decode step."""
    learn_s: float = 4.0
    """The learner's time for one step."""
    publish_s: float = 0.1
    """A weight sync."""
    steps: int = 10
    """Steps that are counted."""

    @property
    def limit(self) -> int:
        """The longest completion, in tokens."""
        return 20 * self.median

    @property
    def step_s(self) -> list[float]:
        """Seconds of a decode step of 0, 1, 2, ... sequences."""
        return [self.tick_s + self.per_sequence_s * n for n in range(self.prompts * self.group * 8)]


class LognormalPolicy:
    """Ends each completion at a length that its prompt and its first token decide; otherwise uniform."""

    vocab_size, num_experts, moe_layers, top_k = VOCABULARY, 0, 0, 0
    eos_ids = frozenset({0})

    def __init__(self, case: Case) -> None:
        self.case = case

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the completion of each row [n, T] whose first token is there."""
        keys = (rows[:, PROMPT - 1].astype(np.uint64) << np.uint64(20)) + rows[:, PROMPT].astype(np.uint64)
        u, v = (np.maximum(uniforms(keys, np.full(len(rows), i)), 1e-12) for i in (0, 1))
        normal = np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * math.pi * v)
        return np.clip(np.rint(self.case.median * np.exp(self.case.spread * normal)), 1, self.case.limit)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), VOCABULARY), np.float32)
        out[:, 0] = -1e4
        if rows.shape[1] > PROMPT:
            last = self.lengths(rows) <= rows.shape[1] - PROMPT + 1
            out[last, 0] = 1e4
        return out

    def text(self, token_ids: np.ndarray) -> str:
        return ""

    def check_whole(self, arrived: Any, engine: str) -> None:
        """A publication of no tensors is whole."""


class SimulatedEngine(ReferenceEngine):
    """Sleeps as long as a decode step of its unfinished sequences takes."""

    step_s: Sequence[float] = ()

    def _tick(self, rows: Rows) -> None:
        if rows is self.rows[0]:
            n = sum(int((~own.finished).sum()) for own in self.rows)
            # What the tick computes is part of it: the next one begins a whole decode step after this one.
            now = time.monotonic()
            self.due = max(getattr(self, "due", now), now - self.step_s[n]) + self.step_s[n]
            time.sleep(max(0.0, self.due - now))
        super()._tick(rows)


def make_simulated(config: RolloutConfig, case: Case, *, name: str) -> SimulatedEngine:
    """One engine, in its own process."""
    engine = SimulatedEngine(config, LognormalPolicy(case), name=name)
    engine.step_s = case.step_s
    return engine


class Prompts:
    """A cursor over prompts whose last token counts them."""

    taken = 0

    def next(self, count: int) -> list[Prompt]:
        self.taken += count
        first = self.taken - count
        return [Prompt(f"p{i}", (1, 2, 10 + i), "") for i in range(first, self.taken)]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


def judge(items: Sequence[Any]) -> list[Any]:
    return [SimpleNamespace(reward=0.0, parts={}) for _ in items]


@dataclass
class Measured:
    """One run."""

    ahead: int
    step_s: float
    engine_idle: float
    learner_idle: float
    staleness: int
    versions: float
    carrying_s: float
    """Of a step: taking work out of the engines and giving it back."""
    predicted_s: float


def simulate_run(case: Case, ahead: int, folder: Path) -> Measured:
    """Steps of the real pipeline with simulated work."""
    import functools

    import ray

    from gspo_dist.actors.rollout_pool import RayRolloutPool
    from gspo_dist.trainer.clockwork import SLICE_S, Clockwork
    from gspo_dist.trainer.pipeline import Collector

    config = RolloutConfig(
        engine="reference",
        engines=case.engines,
        precision="fp32",
        prompts_per_step=case.prompts,
        group_size=case.group,
        max_prompt_tokens=PROMPT,
        max_completion_tokens=case.limit,
        steps_ahead=ahead,
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    make = functools.partial(make_simulated, config, case)
    pool = RayRolloutPool(config, make, [{"num_cpus": 0}] * case.engines, folder)
    pool.start()
    spec = SamplingSpec(n=case.group, max_tokens=case.limit, seed=1)
    steps = case.steps + 2 * ahead + 1
    collector = Collector(
        config, steps, pool, SimpleNamespace(judge=judge), Prompts(), lambda step: spec, Clockwork(config)
    )
    books = Books(pool)
    begun = time.monotonic()
    rows: list[tuple[float, float, float, float]] = []
    rollouts: list[Rollout] = []
    for step in range(1, steps + 1):
        before = time.monotonic()
        collector.sample(step)
        waited = time.monotonic() - before
        rollouts += collector.judged(step)
        with collector.beside_learner():
            time.sleep(case.learn_s)
        carried = time.monotonic()
        collector.pause()
        books.carrying += time.monotonic() - carried
        pool.start_weight_update(60.0)
        time.sleep(case.publish_s)
        pool.finish_weight_update(step, 60.0)
        rows.append((time.monotonic() - begun, waited, books.busy, books.carrying))
    pool.close()
    return summary(case, ahead, rows, rollouts, SLICE_S)


class Books:
    """Seconds in which engines decode, and in which work is given to them."""

    def __init__(self, pool: Any) -> None:
        self.busy = self.carrying = 0.0
        submit, advance = pool.submit, pool.advance

        def submitted(work: Any) -> None:
            begun = time.monotonic()
            submit(work)
            self.carrying += time.monotonic() - begun

        def advanced(ticks: Any = None, seconds: Any = None) -> Any:
            begun = time.monotonic()
            told = advance(ticks, seconds)
            self.busy += (time.monotonic() - begun) * sum(p.ticks > 0 for p in told.values())
            return told

        pool.submit, pool.advance = submitted, advanced


def summary(
    case: Case,
    ahead: int,
    rows: Sequence[tuple[float, float, float, float]],
    rollouts: Sequence[Rollout],
    slice_s: float,
) -> Measured:
    """The steps after the engines are full and before nothing is begun any more."""
    first, last = ahead, len(rows) - 1 - ahead
    count = last - first
    elapsed = rows[last][0] - rows[first][0]
    groups = [rollouts[i : i + case.group] for i in range(0, len(rollouts), case.group)]
    lengths = [[len(r.completion) for r in group] for group in groups]
    ages = [
        n // case.prompts - int(r.completion.policy_versions[0])
        for n, group in enumerate(groups)
        for r in group
    ]
    machine = Machine(
        case.engines, 10**6, case.step_s, case.learn_s, case.publish_s, limit=case.limit, slice_s=slice_s
    )
    model = simulate(machine, lengths, case.prompts, ahead)
    return Measured(
        ahead,
        elapsed / count,
        1.0 - (rows[last][2] - rows[first][2]) / elapsed / case.engines,
        sum(row[1] for row in rows[first + 1 : last + 1]) / elapsed,
        max(ages),
        statistics.fmean(len(np.unique(r.completion.policy_versions)) for r in rollouts),
        (rows[last][3] - rows[first][3]) / count,
        (model.ends[last] - model.ends[first]) / count,
    )


def print_simulated(case: Case, ahead: Sequence[int]) -> list[Measured]:
    """The table of the simulated runs."""
    from gspo_dist.actors.session import start_ray, stop_ray
    from gspo_dist.config import ClusterConfig

    print(
        f"{case.engines} engines, {case.prompts} x {case.group} completions a step, lengths lognormal: "
        f"median {case.median}, spread {case.spread:g}, limit {case.limit}. Simulated: a decode step of n "
        f"sequences takes {1e3 * case.tick_s:g} + {1e3 * case.per_sequence_s:g} n ms, learning "
        f"{case.learn_s:g} s, a publication {case.publish_s:g} s.\n"
    )
    print(
        "| steps ahead | s per step | gain | engines idle | learner idle | oldest, publications | versions "
        "per completion | withdraw and submit, of a step | model, s per step | off |"
    )
    print("|---" * 10 + "|")
    found: list[Measured] = []
    start_ray(ClusterConfig())
    try:
        with tempfile.TemporaryDirectory() as folder:
            for k in ahead:
                m = simulate_run(case, k, Path(folder) / str(k))
                found.append(m)
                print(
                    f"| {k} | {m.step_s:.2f} | {found[0].step_s / m.step_s:.2f}x | {m.engine_idle:.0%} | "
                    f"{m.learner_idle:.0%} | {m.staleness} | {m.versions:.2f} | "
                    f"{m.carrying_s / m.step_s:.2%} | {m.predicted_s:.2f} | "
                    f"{m.step_s / m.predicted_s - 1:+.1%} |",
                    flush=True,
                )
    finally:
        stop_ray()
    return found


def print_slices(rounds: int, overrides: list[str]) -> dict[str, float]:
    """One vLLM engine in this process: a blocking call against slices, in turn.

    An engine that is stepped by hand never waits, so that its CPU time says what a way costs, whatever else
    the host does. Wall time stands beside it.
    """
    from gspo_dist.cli.compose import run_config
    from gspo_dist.coldstart.make import ensure_model
    from gspo_dist.trainer.setup.factories import engine_factory

    config = run_config(["experiment=study", "rollout.max_completion_tokens=128", *overrides])
    engine = engine_factory(config, str(ensure_model(config.model)), "cpu", 0)(name="engine-0")
    prompts = [Prompt(f"p{i}", (5 + i % 7, 6, 7, 8), "") for i in range(16)]
    spec = SamplingSpec(n=8, max_tokens=128, seed=3)
    ways = {
        "one blocking call": {},
        "slices of 0.25 s": {"seconds": 0.25},
        "slices of 16 steps": {"ticks": 16},
        "slices of 8 steps": {"ticks": 8},
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    """(CPU, wall) per token."""
    for turn in range(rounds + 1):
        for way, asked in list(ways.items())[:: 1 if turn % 2 else -1]:
            engine.submit(group_work(prompts, spec, range(len(prompts))))
            begun = time.process_time(), time.perf_counter()
            tokens = left = 1
            while left:
                told = engine.advance(**asked)
                tokens += told.tokens
                left = told.ticks if asked else 0
            if turn:  # the first round warms up
                cpu, wall = time.process_time() - begun[0], time.perf_counter() - begun[1]
                seconds[way].append((cpu / tokens, wall / tokens))
    print("| way | CPU us per token, median (range) | speed by CPU time, pair by pair | speed by wall time |")
    print("|---" * 4 + "|")
    out = {}
    for way, own in seconds.items():
        pairs = [
            [b[clock] / a[clock] - 1 for a, b in zip(own, seconds["one blocking call"], strict=True)]
            for clock in (0, 1)
        ]
        out[way] = statistics.median(pairs[0])
        cost = [1e6 * cpu for cpu, _ in own]
        print(
            f"| {way} | {statistics.median(cost):.1f} ({min(cost):.1f}-{max(cost):.1f}) | {out[way]:+.1%} "
            f"({min(pairs[0]):+.1%} to {max(pairs[0]):+.1%}) | {statistics.median(pairs[1]):+.1%} |"
        )
    engine.close()
    return out


def print_real(ahead: Sequence[int], steps: int, overrides: list[str]) -> None:
    """Runs of the quickstart, one after the other."""
    print(
        "| steps ahead | s per step, median | collect | update | sync | oldest, optimiser steps |\n"
        + "|---" * 6
        + "|"
    )
    from bench_step import measure

    for k in ahead:
        own = ["experiment=quickstart", f"rollout.steps_ahead={k}", "flips.every=0", *overrides]
        kept = measure(own, steps, threads=None)
        kept = kept[: len(kept) - k]  # nothing is begun behind the last k steps
        cells = [
            f"{statistics.median(r[f'time/{p}_s'] for r in kept):.2f}"
            for p in ("step", "collect", "update", "sync")
        ]
        print(f"| {k} | {' | '.join(cells)} | {max(r['rollout/staleness'] for r in kept):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", action="store_true", help="vLLM in slices against one blocking call")
    parser.add_argument("--real", action="store_true", help="gspo train on the quickstart")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2, 4], help="values of steps_ahead")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of --slices")
    parser.add_argument("--learn", type=float, default=Case.learn_s, help="seconds of the simulated learner")
    parser.add_argument("--tick", type=float, default=Case.tick_s, help="seconds of a simulated decode step")
    parser.add_argument("overrides", nargs="*", help="hydra overrides (--slices, --real)")
    options = parser.parse_args()
    if options.slices:
        print_slices(options.rounds, options.overrides)
    elif options.real:
        print_real(options.ahead, options.steps, options.overrides)
    else:
        print_simulated(Case(learn_s=options.learn, tick_s=options.tick, steps=options.steps), options.ahead)


if __name__ == "__main__":
    main()
