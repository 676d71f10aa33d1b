"""The report of a study: report.md with PNGs beside it, and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

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
from gspo_dist.studies.claims import judge
from gspo_dist.studies.figures import by_arm, draw_all, peak_memory
from gspo_dist.studies.study import Study

Cell = Callable[[list[RunData]], str]


def write_report(study: Study, folder: Path, command: str) -> Path:
    """Writes report.md, report.html and figures/ to `folder` from whatever runs exist; returns report.md.

    Raises ValueError when no run has written anything.
    """
    runs = load_runs(study)
    if not runs:
        raise ValueError(f"study {study.name} has no runs in {study.dir}: run `{command}` first")
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_all(study, runs, folder / "figures")
    blocks = _blocks(study, runs, command)
    (folder / "report.md").write_text(_markdown(study, blocks, figures, folder), encoding="utf-8")
    (folder / "report.html").write_text(_html(study, blocks, figures), encoding="utf-8")
    return folder / "report.md"


Table = tuple[list[str], list[list[str]]]
Block = tuple[str, str, Table | None]
"""(heading, paragraph, table)"""


def _blocks(study: Study, runs: Sequence[RunData], command: str) -> list[Block]:
    arms = by_arm(study, runs)
    verdicts = judge(runs)
    ended = [
        [arm, str(r.seed), r.status, str(collapse_step(r) or ""), f"{r.seconds:.0f}", r.reason[:120]]
        for arm, rs in arms.items()
        for r in rs
    ]
    took = sum(r.seconds for r in runs if math.isfinite(r.seconds)) / 60
    seeds = sorted({r.seed for r in runs})
    intro = (
        f"{study.title or study.name}: {len(arms)} arms, seeds {seeds}, the same prompts in the same order, the same "
        f"number of rollouts and updates. Made by `{command}`."
    )
    claims = (
        "The paper's claims",
        "Arithmetic on the numbers below, by the rule beside each verdict. A paired test takes two seeds or more.",
        (
            ["claim", "rule", "verdict", "figures"],
            [[v.claim, v.rule, v.verdict, v.figures] for v in verdicts],
        ),
    )
    return [
        ("Setting", intro, (["shared by every run"], [[" ".join([*study.base, *study.overrides])]])),
        ("Arms", "", (["arm", "differs by"], [[a, " ".join(study.arms[a]) or "(nothing)"] for a in arms])),
        *([] if all(v.verdict == "not testable" for v in verdicts) else [claims]),
        (
            "Final values",
            f"Mean ± 95% confidence half-width over seeds (none for one seed); the difference is paired with `{study.reference}`.",
            _finals(study, runs, arms),
        ),
        (
            "The contract of the log-probs",
            "Means over steps: the first mini-batch of a step, before the policy has moved.",
            _contract(arms),
        ),
        (
            "Cost",
            "What replay costs and what skipping the recomputation saves; means over steps.",
            _costs(arms),
        ),
        (
            "Every run",
            f"{took:.0f} minutes of processes, {study.parallel} at a time. Collapse: {COLLAPSE_RULE}.",
            (["arm", "seed", "status", "collapsed at step", "seconds, start to end", "reason"], ended),
        ),
    ]


def _number(key: str, form: str, last: int | None = None) -> Cell:
    return lambda runs: estimate([r.mean(key, last) for r in runs]).text(form)


def _finals(study: Study, runs: Sequence[RunData], arms: dict[str, list[RunData]]) -> Table:
    columns: dict[str, Cell] = {
        "held-out before": lambda rs: estimate(
            [r.series(HELDOUT)[1][0] if len(r.series(HELDOUT)[1]) else math.nan for r in rs]
        ).text(),
        "held-out after": lambda rs: estimate([final_accuracy(r) for r in rs]).text(),
        "lowest on the way": lambda rs: estimate(
            [float(r.series(HELDOUT)[1].min()) if len(r.series(HELDOUT)[1]) else math.nan for r in rs]
        ).text(),
        "reward, all steps": _number(REWARD, "{:.3f}"),
        "reward, last 5 steps": _number(REWARD, "{:.3f}", 5),
        "clip fraction": _number("objective/clip_fraction", "{:.2g}"),
        "clipped, A < 0": _number("objective/clip_fraction_negative", "{:.2g}"),
        "clipped, A > 0": _number("objective/clip_fraction_positive", "{:.2g}"),
        "mismatch k3": _number("mismatch/k3_kl", "{:.1e}"),
        "flips engine": _number("routing/engine/flip_fraction", "{:.2%}"),
        "flips update": _number("routing/update/flip_fraction", "{:.2%}"),
        "collapsed": lambda rs: f"{sum(collapse_step(r) is not None for r in rs)}/{len(rs)}",
    }
    rows = []
    for arm, own in arms.items():
        against = [
            paired(runs, arm, study.reference, value).text(100) for value in (final_accuracy, mean_reward)
        ]
        rows.append(
            [
                arm,
                *(cell(own) for cell in columns.values()),
                *(["reference"] * 2 if arm == study.reference else against),
            ]
        )
    names = (
        f"held-out after, points over {study.reference}",
        f"reward of all steps, points over {study.reference}",
    )
    return ["arm", *columns, *names], rows


def _contract(arms: dict[str, list[RunData]]) -> Table:
    """What the old log-probs did to the first mini-batch, whose ratio is 1 when nothing is mismatched."""
    columns: dict[str, Cell] = {
        "offset, clip widths": _number("contract/offset_clip_widths", "{:+.2f}"),
        "size of the offset": lambda rs: estimate(
            [
                float(np.abs(r.series("contract/offset_clip_widths")[1]).mean())
                if len(r.series("contract/offset_clip_widths")[1])
                else math.nan
                for r in rs
            ]
        ).text("{:.2f}"),
        "clipped in mini-batch 0": _number("objective/mini_batch_0/clip_fraction", "{:.3f}"),
        "of A < 0": _number("objective/mini_batch_0/clip_fraction_negative", "{:.3f}"),
        "of A > 0": _number("objective/mini_batch_0/clip_fraction_positive", "{:.3f}"),
        "guard active": _number("contract/guard_active", "{:.2f}"),
        "steps recomputed": _number("contract/recomputed", "{:.2f}"),
        "mismatch k1": _number("mismatch/kl", "{:+.1e}"),
        "mismatch k3": _number("mismatch/k3_kl", "{:.1e}"),
        "largest": _number("mismatch/abs_log_ratio_max", "{:.2f}"),
        "ESS": _number("mismatch/ess", "{:.4f}"),
    }
    return ["arm", *columns], [[arm, *(cell(own) for cell in columns.values())] for arm, own in arms.items()]


def _costs(arms: dict[str, list[RunData]]) -> Table:
    columns: dict[str, Cell] = {
        "step s": _number("time/step_s", "{:.2f}"),
        "collect s": _number("time/collect_s", "{:.2f}"),
        "old log-probs s": _number("time/old_logprobs_s", "{:.3f}"),
        "update s": _number("time/update_s", "{:.2f}"),
        "sync s": _number("time/sync_s", "{:.3f}"),
        "flip metric s": _number("time/flips_s", "{:.2f}"),
        "tokens/s": _number("perf/tokens_per_s", "{:.0f}"),
        "replay bytes a token": _number("routing/replay_bytes_per_token", "{:.1f}"),
        "peak memory GiB": lambda rs: estimate([peak_memory(r) / 2**30 for r in rs]).text("{:.2f}"),
    }
    return ["arm", *columns], [[arm, *(cell(own) for cell in columns.values())] for arm, own in arms.items()]


def _markdown(study: Study, blocks: Sequence[Block], figures: dict[str, Path], folder: Path) -> str:
    out = [f"# {study.title or study.name}", ""]
    for heading, text, table in blocks:
        out += [f"## {heading}", "", *([text, ""] if text else [])]
        if table:
            head, rows = table
            out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            out += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows] + [""]
    for title, path in figures.items():
        out += [f"## {title}", "", f"![{title}]({path.relative_to(folder)})", ""]
    return "\n".join(out)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;margin:.5rem 0}td,th{border:1px solid #ddd;"
    "padding:.3rem .6rem;text-align:left;vertical-align:top}th{background:#f4f6f8}img{max-width:100%}code{background:#f4f6f8}"
)


def _html(study: Study, blocks: Sequence[Block], figures: dict[str, Path]) -> str:
    title = html.escape(study.title or study.name)
    out = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    ]
    for heading, text, table in blocks:
        out.append(f"<h2>{html.escape(heading)}</h2>" + (f"<p>{_inline(text)}</p>" if text else ""))
        if table:
            head, rows = table
            out.append("<table><tr>" + "".join(f"<th>{html.escape(c)}" for c in head))
            out += ["<tr>" + "".join(f"<td>{_cell(c)}" for c in row) for row in rows] + ["</table>"]
    for name, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        out.append(
            f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
        )
    return "\n".join(out) + "</html>\n"


def _cell(text: str) -> str:
    return html.escape(text).replace(" ± ", "&nbsp;±&nbsp;")


def _inline(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
