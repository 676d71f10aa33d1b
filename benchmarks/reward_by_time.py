"""What rollouts begun ahead gain in the same time, where sampling and learning have machines of their own.

    python benchmarks/reward_by_time.py runs/staleness         # the folder of a study's runs, ARM/seed-N
    python benchmarks/reward_by_time.py runs/staleness --figure by_time.png --arms gspo_k0 gspo_k2

A study on a laptop trains with one core a run, where nothing can overlap: its curves say what a step gains,
and not what a second gains. The seconds come from the discrete-event model of the planner
(gspo_dist/planner/pipeline.py), on the machine and the lengths that bench_async.py measures it on: two
engines, lognormal lengths up to 20 times the median. Recomputed log-probs lengthen the learner's time by
the share that they took in the runs. All arms are read at one second, at which the first of them is out
of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from bench_async import Case

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.planner.pipeline import Machine, simulate
from gspo_dist.studies.analysis import REWARD, estimate

WINDOW = 4
"""Steps whose mean reward stands for a moment."""
SAMPLE = 200
"""Steps of the model, drawn by a seed."""


@dataclass(frozen=True)
class Arm:
    """The finished runs of one setting."""

    name: str
    """Of its folder."""
    steps_ahead: int
    """rollout.steps_ahead of its runs."""
    recomputed: float
    """Seconds of recomputed log-probs over seconds of the update: medians over all steps."""
    rewards: Sequence[Sequence[float]]
    """Training reward of each step, a list per seed."""

    @property
    def steps(self) -> int:
        """Steps that every seed has."""
        return min(len(own) for own in self.rewards)

    def around(self, step: int) -> list[float]:
        """Mean reward of the WINDOW steps up to `step` (from 1 on), a number per seed."""
        return [statistics.fmean(own[max(0, step - WINDOW) : step]) for own in self.rewards]


def read_arm(folder: Path) -> Arm | None:
    """An arm's finished runs, None without any. ValueError where they differ in rollout.steps_ahead."""
    runs = sorted(path.parent for path in folder.glob("seed-*/summary.json"))
    if not runs:
        return None
    ahead = {json.loads((run / "config.json").read_text())["rollout"]["steps_ahead"] for run in runs}
    if len(ahead) > 1:
        raise ValueError(
            f"the runs of an arm must have one rollout.steps_ahead: {folder} has {sorted(ahead)}"
        )
    rows: list[list[dict[str, Any]]] = [
        [row for row in read_jsonl(run / "metrics.jsonl") if row.get(REWARD) is not None] for run in runs
    ]
    update, old = (
        statistics.median(row[f"time/{part}_s"] for own in rows for row in own)
        for part in ("update", "old_logprobs")
    )
    return Arm(folder.name, ahead.pop(), old / update, [[row[REWARD] for row in own] for own in rows])


def step_seconds(arm: Arm, case: Case) -> float:
    """What a step of this arm takes on the machine of `case`."""
    rng = np.random.default_rng(0)
    drawn = case.median * np.exp(case.spread * rng.standard_normal((SAMPLE * case.prompts, case.group)))
    lengths = np.clip(np.rint(drawn), 1, case.limit).astype(int).tolist()
    machine = Machine(
        case.engines,
        10**6,  # places: a sequence never waits for one
        case.step_s,
        case.learn_s * (1.0 + arm.recomputed),
        case.publish_s,
        limit=case.limit,
    )
    return simulate(machine, lengths, case.prompts, arm.steps_ahead, warm_up=8, cool_down=8).step_s


def table(arms: Sequence[Arm], seconds: Sequence[float]) -> list[str]:
    """A line per arm: its reward after as many steps as every arm has, and at the second at which the first
    arm is out of steps."""
    common = min(arm.steps for arm in arms)
    budget = min(arm.steps * s for arm, s in zip(arms, seconds, strict=True))
    lines = [
        f"| arm | steps ahead | model, s per step | reward at step {common} | steps in {budget:.0f} s "
        f"| reward after {budget:.0f} s |",
        "|---" * 6 + "|",
    ]
    for arm, s in zip(arms, seconds, strict=True):
        reached = int(budget / s + 1e-9)
        lines.append(
            f"| {arm.name} | {arm.steps_ahead} | {s:.2f} | {estimate(arm.around(common)).text('{:.3f}')} "
            f"| {reached} | {estimate(arm.around(reached)).text('{:.3f}')} |"
        )
    return lines


def curve(arm: Arm, seconds: float) -> tuple[list[float], list[float]]:
    """(seconds, reward) after each step from the WINDOW-th on, the reward as a mean over seeds."""
    steps = range(WINDOW, arm.steps + 1)
    return [step * seconds for step in steps], [statistics.fmean(arm.around(step)) for step in steps]


def draw(arms: Sequence[Arm], seconds: Sequence[float], path: Path) -> None:
    """The curves of all arms in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for number, (arm, s) in enumerate(zip(arms, seconds, strict=True)):
        axis.plot(*curve(arm, s), ("-", "--", ":")[number // 10 % 3], color=f"C{number % 10}", label=arm.name)
    axis.set_xlabel("seconds, by the model of the pipeline")
    axis.set_ylabel(f"training reward, mean of {WINDOW} steps")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a study's folder of runs")
    parser.add_argument("--tick", type=float, default=0.03, help="seconds of a simulated decode step")
    parser.add_argument("--arms", nargs="+", default=["*"], help="names of arms, or patterns; all without it")
    parser.add_argument("--figure", type=Path, help="also draw reward against seconds into this file")
    options = parser.parse_args()
    folders = sorted({path for name in options.arms for path in options.folder.glob(name) if path.is_dir()})
    arms = [arm for arm in map(read_arm, folders) if arm is not None]
    if not arms:
        sys.exit(
            f"{options.folder} holds no finished run (ARM/seed-N/summary.json): run `gspo compare` first"
        )
    case = Case(tick_s=options.tick)
    seconds = [step_seconds(arm, case) for arm in arms]
    print("\n".join(table(arms, seconds)))
    if options.figure:
        draw(arms, seconds, options.figure)


if __name__ == "__main__":
    main()
