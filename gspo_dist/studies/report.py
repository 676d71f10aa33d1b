"""The report of a study: report.md with PNGs beside it, and on demand a report.html that holds everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gspo_dist.files import write_text
from gspo_dist.studies.analysis import (
    COLLAPSE_RULE,
    HELDOUT,
    REWARD,
    RunData,
    collapse_step,
    estimate,
    final_accuracy,
    load_runs,
    mean_reward,
    paired,
)
from gspo_dist.studies.claims import verdicts_on
from gspo_dist.studies.figures import Arms, by_arm, draw_all, peak_memory
from gspo_dist.studies.pages import Block, Table, html_page, markdown_page
from gspo_dist.studies.study import Study

Cell = Callable[[list[RunData]], str]
"""One column of a table: the runs of an arm -> the text of its cell."""


def write_report(study: Study, folder: Path, command: str, *, html: bool = False) -> list[Path]:
    """Writes report.md and figures/ to `folder` from whatever runs exist, and report.html if asked for.

    `command` is named in the report as what made it. Returns the pages that were written, report.md first.
    May be called again: each file is replaced at once, so a full disk leaves the old report whole. Raises
    ValueError when no run has written anything, and OSError when a page cannot be written.
    """
    runs = load_runs(study)
    if not runs:
        raise ValueError(f"study {study.name} has no runs in {study.dir}: run `{command}` first")
    folder.mkdir(parents=True, exist_ok=True)
    title, blocks = study.title or study.name, _blocks(study, runs, command)
    figures = draw_all(study, runs, folder / "figures")
    pages = {"report.md": markdown_page(title, blocks, figures, folder)}
    if html:
        pages["report.html"] = html_page(title, blocks, figures)
    for name, text in pages.items():
        write_text(folder / name, text)
    return [folder / name for name in pages]


def _blocks(study: Study, runs: Sequence[RunData], command: str) -> list[Block]:
    """The sections, in order: the setting, the verdicts, the numbers, every run."""
    arms = by_arm(study, runs)
    seeds = sorted({run.seed for run in runs})
    took = sum(run.seconds for run in runs if math.isfinite(run.seconds)) / 60
    return [
        Block(
            "Setting",
            f"{study.title or study.name}: {len(arms)} arms, seeds {seeds}, the same prompts in the same "
            f"order, the same number of rollouts and updates. Made by `{command}`.",
            Table(["shared by every run"], [[" ".join([*study.base, *study.overrides])]]),
        ),
        Block(
            "Arms",
            "",
            Table(["arm", "differs by"], [[arm, " ".join(study.arms[arm]) or "(nothing)"] for arm in arms]),
        ),
        *_claims(runs),
        Block(
            "Final values",
            "Mean ± 95% confidence half-width over seeds (none for one seed); the difference is paired with "
            f"`{study.reference}`.",
            _finals(study, runs, arms),
        ),
        Block(
            "The contract of the log-probs",
            "Means over steps: the first mini-batch of a step, before the policy has moved.",
            _by_arm(arms, CONTRACT),
        ),
        *_ages(arms),
        Block(
            "Cost",
            "What replay costs and what skipping the recomputation saves; means over steps.",
            _by_arm(arms, COST),
        ),
        Block(
            "Every run",
            f"{took:.0f} minutes of processes, {study.parallel} at a time. Collapse: {COLLAPSE_RULE}.",
            Table(
                ["arm", "seed", "status", "collapsed at step", "seconds, start to end", "reason"],
                [_ended(run) for own in arms.values() for run in own],
            ),
        ),
    ]


def _claims(runs: Sequence[RunData]) -> list[Block]:
    """The verdicts, or nothing for a study whose arms test none of the claims."""
    verdicts = verdicts_on(runs)
    if all(verdict.verdict == "not testable" for verdict in verdicts):
        return []
    return [
        Block(
            "The paper's claims",
            "Arithmetic on the numbers below, by the rule beside each verdict. "
            "A paired test takes two seeds or more.",
            Table(
                ["claim", "rule", "verdict", "figures"],
                [[v.claim, v.rule, v.verdict, v.figures] for v in verdicts],
            ),
        )
    ]


def _ages(arms: Arms) -> list[Block]:
    """What lies between sampling and learning, of the arms whose rollouts were begun ahead."""
    aged = {
        arm: own for arm, own in arms.items() if any(run.mean("staleness/token_fraction") > 0 for run in own)
    }
    if not aged:
        return []
    text = "Means over steps, taken when a step begins: log s is what the policy has moved since it sampled."
    return [Block("The age of rollouts", text, _by_arm(aged, AGE))]


def _ended(run: RunData) -> list[str]:
    collapsed = str(collapse_step(run) or "")
    return [run.arm, str(run.seed), run.status, collapsed, f"{run.seconds:.0f}", run.reason[:120]]


def _by_arm(arms: Arms, columns: Mapping[str, Cell]) -> Table:
    """One row per arm."""
    rows = [[arm, *(cell(own) for cell in columns.values())] for arm, own in arms.items()]
    return Table(["arm", *columns], rows)


def _number(key: str, form: str, last: int | None = None) -> Cell:
    """A metric's mean over the run (its last steps), then over seeds."""
    return lambda runs: estimate([run.mean(key, last) for run in runs]).text(form)


def _of_series(key: str, pick: Callable[[np.ndarray], float], form: str = "{:.3f}") -> Cell:
    """`pick` of a metric's values in each run, then the mean over seeds; nan where a run has none."""

    def value(run: RunData) -> float:
        values = run.series(key)[1]
        return float(pick(values)) if len(values) else math.nan

    return lambda runs: estimate([value(run) for run in runs]).text(form)


def _collapsed(runs: list[RunData]) -> str:
    return f"{sum(collapse_step(run) is not None for run in runs)}/{len(runs)}"


FINAL: dict[str, Cell] = {
    "held-out before": _of_series(HELDOUT, lambda values: values[0]),
    "held-out after": lambda runs: estimate([final_accuracy(run) for run in runs]).text(),
    "lowest on the way": _of_series(HELDOUT, np.min),
    "reward, all steps": _number(REWARD, "{:.3f}"),
    "reward, last 5 steps": _number(REWARD, "{:.3f}", 5),
    "clip fraction": _number("objective/clip_fraction", "{:.2g}"),
    "clipped, A < 0": _number("objective/clip_fraction_negative", "{:.2g}"),
    "clipped, A > 0": _number("objective/clip_fraction_positive", "{:.2g}"),
    "mismatch k3": _number("mismatch/k3_kl", "{:.1e}"),
    "flips engine": _number("routing/engine/flip_fraction", "{:.2%}"),
    "flips update": _number("routing/update/flip_fraction", "{:.2%}"),
    "collapsed": _collapsed,
}

CONTRACT: dict[str, Cell] = {
    "offset, clip widths": _number("guard/offset_clip_widths", "{:+.2f}"),
    "size of the offset": _of_series("guard/offset_clip_widths", lambda x: float(np.abs(x).mean()), "{:.2f}"),
    "clipped in mini-batch 0": _number("objective/mini_batch_0/clip_fraction", "{:.3f}"),
    "of A < 0": _number("objective/mini_batch_0/clip_fraction_negative", "{:.3f}"),
    "of A > 0": _number("objective/mini_batch_0/clip_fraction_positive", "{:.3f}"),
    "guard active": _number("guard/active", "{:.2f}"),
    "steps recomputed": _number("old_logprobs/recomputed", "{:.2f}"),
    "mismatch k1": _number("mismatch/kl", "{:+.1e}"),
    "mismatch k3": _number("mismatch/k3_kl", "{:.1e}"),
    "largest": _number("mismatch/abs_log_ratio_max", "{:.2f}"),
    "ESS": _number("mismatch/ess", "{:.4f}"),
}
"""What the old log-probs did to the first mini-batch, whose ratio is 1 when nothing is mismatched."""

AGE: dict[str, Cell] = {
    "oldest, optimiser steps": _of_series("rollout/staleness", np.max, "{:.0f}"),
    "mean age, optimiser steps": _number("rollout/staleness_mean", "{:.1f}"),
    "versions per completion": _number("rollout/versions_per_completion", "{:.2f}"),
    "mean of log s": _number("staleness/log_ratio_mean", "{:+.1e}"),
    "its spread": _number("staleness/log_ratio_std", "{:.1e}"),
    "outside of the clip": _number("staleness/outside_clip_fraction", "{:.2f}"),
    "clipped in mini-batch 0": _number("objective/mini_batch_0/clip_fraction", "{:.3f}"),
    "ratio ignores the age": _number("staleness/ignored", "{:.0f}"),
}
"""What the age of rollouts does to the ratio, in nats per token for a ratio by sequence."""

COST: dict[str, Cell] = {
    "step s": _number("time/step_s", "{:.2f}"),
    "collect s": _number("time/collect_s", "{:.2f}"),
    "old log-probs s": _number("time/old_logprobs_s", "{:.3f}"),
    "update s": _number("time/update_s", "{:.2f}"),
    "sync s": _number("time/sync_s", "{:.3f}"),
    "flip metric s": _number("time/flips_s", "{:.2f}"),
    "tokens/s": _number("perf/tokens_per_s", "{:.0f}"),
    "replay bytes per token": _number("routing/replay_bytes_per_token", "{:.1f}"),
    "peak memory GiB": lambda runs: estimate([peak_memory(run) / 2**30 for run in runs]).text("{:.2f}"),
}


def _finals(study: Study, runs: Sequence[RunData], arms: Arms) -> Table:
    """Where every arm ended, and its paired differences from the reference in points."""
    table = _by_arm(arms, FINAL)
    for row in table.rows:
        tests = [paired(runs, row[0], study.reference, value) for value in (final_accuracy, mean_reward)]
        row += ["reference"] * 2 if row[0] == study.reference else [test.text(100) for test in tests]
    names = ("held-out after", "reward of all steps")
    return Table([*table.head, *(f"{name}, points over {study.reference}" for name in names)], table.rows)
