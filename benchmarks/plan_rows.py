"""What the planner predicts of published runs, beside what they took.

    python benchmarks/plan_rows.py --report benchmarks/reports/planner.md

benchmarks/published.toml holds the rows: settings as their users set them, and where they stand. Each row
goes through the planner's own clock (`step_time`), and its steps through the planner's simulation with as
many steps ahead as the source has. Half of the rows set the numbers of gspo_dist/planner/calibration.py. The
other half only tests them.
"""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.config import (
    LearnerConfig,
    MegatronConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
)
from gspo_dist.models.shape import ModelShape, find_model, shape_from_config
from gspo_dist.planner.ahead import draw, machine_of, steps_needed, steps_of
from gspo_dist.planner.calibration import ASSUMPTIONS, SPEEDS, Assumptions, GpuSpeed
from gspo_dist.planner.hardware import find_gpu
from gspo_dist.planner.layout import EngineLayout, LearnerLayout, Workload
from gspo_dist.planner.memory import engine_memory
from gspo_dist.planner.pipeline import Lengths
from gspo_dist.planner.throughput import StepTime, step_time

ROWS = Path(__file__).with_name("published.toml")
CLOSE = 0.15
"""A prediction within this share of what was published is met."""


@dataclass(frozen=True)
class Prediction:
    """One row, and what the planner says of it."""

    row: dict[str, Any]
    """Its settings, defaults filled in."""
    seconds: float
    """The planner's word for what the row measures."""
    time: StepTime
    """Its parts."""

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.seconds / float(self.row["published_s"]) - 1.0

    @property
    def met(self) -> bool:
        return abs(self.error) <= CLOSE


def read_rows(path: Path = ROWS) -> dict[str, Any]:
    """The file, with every row's defaults filled in."""
    data = tomllib.loads(path.read_text())
    data["row"] = [{**data["defaults"][row["source"]], **row} for row in data["row"]]
    return data


def model_of(name: str, data: dict[str, Any]) -> ModelShape:
    hf = data.get("models", {}).get(name)
    return shape_from_config(hf, name) if hf else find_model(name)


def views_of(row: dict[str, Any]) -> tuple[LearnerLayout, EngineLayout, Workload]:
    """The planner's three views of a row."""
    completion = row["max_length"] - row["mean_prompt"]
    rollout = RolloutConfig(
        engines=row["engines"][0],
        tensor_parallel=row["engines"][1],
        prompts_per_step=row["prompts"],
        group_size=row["group"],
        max_prompt_tokens=row["mean_prompt"],
        max_completion_tokens=completion,
        gpu_memory_utilization=row["utilization"],
        precision="bf16",
    )
    megatron = MegatronConfig(
        tensor_parallel=row.get("tensor", 1),
        pipeline_parallel=row.get("pipeline", 1),
        context_parallel=row.get("context", 1),
        expert_parallel=row.get("expert", 1),
        recompute=row.get("recompute", "none"),
        grouped_gemm=row["grouped"],
    )
    learner = LearnerConfig(
        backend="megatron",
        world_size=row["ranks"],
        token_budget=row["token_budget"],
        forward_token_budget=row.get("forward_budget"),
        precision="bf16",
        megatron=megatron,
    )
    objective = ObjectiveConfig(
        old_logprobs="recompute" if row["passes"] > 1 else "rollout", kl_coef=0.01 if row["passes"] else 0.0
    )
    run = RunConfig(mini_batches=row["mini_batches"], learner=learner, rollout=rollout, objective=objective)
    lengths = Lengths(row["mean_length"] - row["mean_prompt"], run.plan.length_spread, completion)
    work = Workload(
        run,
        measured=lengths,
        mean_prompt_tokens=row["mean_prompt"],
        unpacked=row.get("unpacked"),
    )
    return LearnerLayout(learner, True), EngineLayout(rollout, row.get("colocated", False)), work


def predict(row: dict[str, Any], data: dict[str, Any], assume: Assumptions = ASSUMPTIONS) -> Prediction:
    """What the planner says of one row."""
    learner, engine, work = views_of(row)
    model, gpu = model_of(row["model"], data), find_gpu(row["gpu"])
    places = max(1, engine_memory(model, engine, work, gpu.memory).decoded)
    time = step_time(model, learner, engine, work, gpu, places, assume)
    parts = {"train": time.train_s, "forward": time.logprobs_s, "sync": time.sync_s}
    if row["measures"] != "step":
        return Prediction(row, parts[row["measures"]], time)
    machine = machine_of(model, engine, work, gpu, places, time, assume)
    groups = draw(work.lengths, work, steps_needed(work, row["ahead"]))
    return Prediction(row, steps_of(machine, groups, work, row["ahead"]).step_s, time)


PRIOR = {
    "H100 train": 0.45,
    "GB200 train": 0.40,
    "decode": 0.70,
    "GB200 host": 1.15,
    "layer_s": 4.5e-3,
    "expert_s": 1e-4,
    "dense_layer_s": 6e-4,
    "decode_layer_s": 1e-4,
    "reduce_far_s": 8e-5,
}
"""What the fitted numbers are drawn to where rows say nothing else: well-fed products, CUDA graphs, NCCL."""
ROW_SIGMA, PRIOR_SIGMA = 0.05, 0.3
"""Deviations in logarithms: a row is held to 5%, a number to 30% of its prior."""


def assumed(values: dict[str, float]) -> Assumptions:
    """The calibration with other values of what is fitted."""
    speeds = {
        **SPEEDS,
        "H100": GpuSpeed(values["H100 train"], values["decode"]),
        "GB200": GpuSpeed(values["GB200 train"], values["decode"], host=values["GB200 host"]),
    }
    return replace(ASSUMPTIONS, speeds=speeds, **{k: v for k, v in values.items() if k.endswith("_s")})


def fit(data: dict[str, Any], rounds: int = 4) -> dict[str, float]:
    """The values with which the rows that may set them come out best: least squares in logarithms.

    Rows that were kept apart are not looked at.
    """
    rows = [row for row in data["row"] if row["use"] == "set"]
    start = np.log(list(PRIOR.values()))

    def values(x: np.ndarray) -> dict[str, float]:
        return dict(zip(PRIOR, np.exp(x).tolist(), strict=True))

    def residuals(x: np.ndarray) -> np.ndarray:
        assume = assumed(values(x))
        errors = [np.log1p(predict(row, data, assume).error) / ROW_SIGMA for row in rows]
        return np.array([*errors, *(x - start) / PRIOR_SIGMA])

    x, width = start.copy(), 0.02
    for _ in range(rounds):
        here = residuals(x)
        slopes = [(residuals(x + width * unit) - here) / width for unit in np.eye(len(x))]
        x = x + np.clip(np.linalg.lstsq(np.stack(slopes, 1), -here, rcond=None)[0], -0.4, 0.4)
    return values(x)


def table(predictions: list[Prediction], use: str) -> list[str]:
    lines = [
        "| row | published s | predicted s | error | collect | log-probs | train | sync | other | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for p in predictions:
        if p.row["use"] != use:
            continue
        t = p.time
        other = t.driver_s + t.switch_s + t.side_s
        mark = "" if p.met else "**not met**"
        lines.append(
            f"| {p.row['name']} | {p.row['published_s']:g} | {p.seconds:.3g} | {p.error:+.0%} | "
            f"{t.collect_s:.0f} | {t.logprobs_s:.0f} | {t.train_s:.0f} | {t.sync_s:.1f} | {other:.1f} | "
            f"{mark} |"
        )
    return lines


def report(predictions: list[Prediction], data: dict[str, Any]) -> str:
    """The page: both halves, what was missed and why, what could not be asked, and the sources."""
    counts = {
        use: (
            sum(p.met for p in predictions if p.row["use"] == use),
            sum(p.row["use"] == use for p in predictions),
        )
        for use in ("set", "kept")
    }
    lines = [
        "# The planner against published runs",
        "",
        "Made by `python benchmarks/plan_rows.py --report benchmarks/reports/planner.md`. Settings and",
        "sources: [published.toml](../published.toml). What is assumed:",
        "[calibration.py](../../gspo_dist/planner/calibration.py), one value per GPU, host and link, none",
        "per row.",
        "",
        f"Within 15%: {counts['set'][0]} of {counts['set'][1]} rows that set those values, "
        f"{counts['kept'][0]} of {counts['kept'][1]} rows that were kept to test them.",
        "",
        "Which terms the clock has was chosen with all rows in view. Their values come from the first half",
        "alone (`--fit`).",
        "",
        "Taken for all rows, because no source says it: the spread of lengths (0.8, `plan.length_spread`),",
        "prompts of 128 tokens, and experts that are computed one after the other (recipes leave it unset).",
        "",
        '"Predicted" is the simulated step (`gspo_dist/planner/pipeline.py`) with the source\'s steps ahead.',
        "The parts are those of a step in which nothing overlaps, so with steps ahead they add up to more.",
        "Rows that measure a part are compared with that part.",
        "",
        "## Rows that set the values",
        "",
        *table(predictions, "set"),
        "",
        "## Rows kept apart",
        "",
        *table(predictions, "kept"),
        "",
        "## Rows that are not met",
        "",
    ]
    missed = [p for p in predictions if not p.met]
    for p in missed:
        why = p.row.get("why", "No explanation was found.")
        lines.append(f"* {p.row['name']} ({p.error:+.0%}, {p.row['use']}): {why}")
    lines += ["" if missed else "None.", "## Rows without an input that decides", ""]
    lines += [f"* {m['name']}: {m['what']}." for m in data["missing"]]
    lines += ["", "## Sources", ""]
    lines += [f"* [{s['title']}]({s['url']}). Settings: {s['settings']}." for s in data["sources"].values()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="write the page here")
    parser.add_argument("--fit", action="store_true", help="set the calibration anew (a minute)")
    args = parser.parse_args()
    data = read_rows()
    if args.fit:
        print("\n".join(f"{name:<16}{value:.3g}" for name, value in fit(data).items()))
        return
    predictions = []
    for row in data["row"]:
        predictions.append(predict(row, data))
        p = predictions[-1]
        t = p.time
        parts = f"{t.collect_s:.0f}+{t.logprobs_s:.0f}+{t.train_s:.0f}+{t.sync_s:.0f}"
        print(
            f"{p.row['use']:>5} {p.row['published_s']:>7g} {p.seconds:>7.1f} {p.error:>+6.0%} {parts:>16}  "
            f"{p.row['name']}"
        )
    if args.report:
        args.report.write_text(report(predictions, data))


if __name__ == "__main__":
    main()
