"""A page of a run's episodes: every token with its mask, log-prob, policy version and advantage, in HTML.

The trainer appends a few episodes per step to episodes.jsonl. `gspo episodes RUN_DIR` makes the page of them.
It needs nothing but the file, and no network.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.types import Rollout

EPISODES = "episodes.jsonl"
WORST = -6.0
"""Log-probs from here down have the strongest colour, in nats."""
STYLE = """
body { font: 14px/1.5 sans-serif; margin: 2em auto; max-width: 64em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1em; margin: 0; }
section { border: 1px solid #ccc; border-radius: 4px; padding: .6em 1em; margin: 0 0 1em; }
.facts { color: #555; margin: 0; }
.tokens { font: 15px/2.1 monospace; white-space: pre-wrap; word-break: break-all; margin: .3em 0; }
.tokens span { padding: 2px 1px; border-bottom: 3px solid transparent; }
.prompt { color: #777; }
.environment { background: #e2e2e2; color: #444; }
.tokens .more { border-bottom-color: #2a7f3f; } .tokens .less { border-bottom-color: #8a3fa0; }
table { border-collapse: collapse; width: 100%; }
td, th { border-top: 1px solid #ddd; padding: 2px 8px; text-align: left; vertical-align: top; }
td { font-family: monospace; white-space: pre-wrap; word-break: break-all; }
th { font-weight: normal; color: #555; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; } th.number { text-align: right; }
"""
LEGEND = (
    '<p class="tokens"><span class="prompt">the prompt</span> <span class="environment">the environment\'s, '
    "not trained on</span> the policy's: redder is less likely, "
    + "".join(
        f'<span style="background: rgba(220, 60, 40, {abs(x / WORST):.2f})">{x:g}</span> '
        for x in (0.0, -3.0, WORST)
    )
    + 'nats <span class="more">advantage above 0</span> <span class="less">below 0</span></p>'
    "<p>Hold the pointer over a token for its log-prob, policy version and advantage.</p>"
)
TURN_COLUMNS = {
    "turn": "",
    "the policy said": "",
    "the environment answered": "",
    "reward": "number",
    "advantage, mean": "number",
    "log-prob, mean": "number",
    "versions": "number",
}
"""Columns of an episode's table of turns, with their classes."""


def episode_rows(
    rollouts: Sequence[Rollout],
    given: Sequence[float | np.ndarray],
    pieces: Callable[[Sequence[int]], list[str]],
    count: int,
) -> list[dict[str, Any]]:
    """`count` episodes of a step as rows of episodes.jsonl, evenly spaced; none without an environment.

    given: what was packed as the advantages of each. pieces: token ids -> their texts.
    """
    chosen = [i for i, rollout in enumerate(rollouts) if rollout.completion.turns]
    places = np.unique(np.linspace(0, len(chosen) - 1, num=min(count, len(chosen)), dtype=int))
    rows = []
    for i in (chosen[place] for place in places.tolist()):
        rollout, c = rollouts[i], rollouts[i].completion
        advantages = np.broadcast_to(np.asarray(given[i], np.float64), (len(c),))
        rows.append(
            {
                "rollout_id": rollout.rollout_id,
                "group_id": rollout.group_id,
                "prompt": rollout.prompt.text,
                "answer": str(rollout.prompt.answer),
                "reward": rollout.reward,
                "parts": dict(rollout.reward_parts),
                "finish_reason": c.finish_reason,
                "tokens": pieces(c.token_ids.tolist()),
                "mask": c.loss_mask.astype(int).tolist(),
                "logprobs": [round(float(x), 4) for x in c.logprobs],
                "versions": c.policy_versions.tolist(),
                "advantages": [round(float(x), 4) for x in advantages],
                "turns": [
                    {
                        "start": t.start,
                        "end": t.end,
                        "stop": t.stop,
                        "said": t.said,
                        "answer": t.observation,
                        "reward": t.reward,
                        "failed": t.failed,
                    }
                    for t in c.turns
                ],
            }
        )
    return rows


def page_of(run_dir: Path, last: int) -> str:
    """The page of the newest `last` steps. ValueError: the run has no episodes."""
    rows = read_jsonl(run_dir / EPISODES)
    if not rows:
        raise ValueError(
            f"{run_dir} must be a run with an environment: it has no {EPISODES}; run one with "
            "environment.factory or environment.tools, and logger.samples_per_step above 0"
        )
    steps = sorted({row["step"] for row in rows})[-last:]
    body = "".join(_episode(row) for row in rows if row["step"] in steps)
    title = html.escape(f"Episodes of {run_dir.name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{LEGEND}{body}</body></html>\n"
    )


def _episode(row: Mapping[str, Any]) -> str:
    facts = [
        f"reward {row['reward']:g}",
        f"ended by {row['finish_reason']}",
        f"answer {row['answer']}",
        *(f"{name} {value:g}" for name, value in row["parts"].items()),
    ]
    # A reset that says nothing is no row.
    turns = [(i, turn) for i, turn in enumerate(row["turns"]) if i or turn["answer"] or turn["failed"]]
    head = "".join(f"<th{_classed(kind)}>{name}</th>" for name, kind in TURN_COLUMNS.items())
    return (
        f"<section><h2>Step {row['step']}, rollout {row['rollout_id']} of group {row['group_id']}</h2>"
        f'<p class="facts">{html.escape(", ".join(facts))}</p>'
        f'<div class="tokens"><span class="prompt">{html.escape(row["prompt"])}</span>'
        f"{''.join(_tokens(row))}</div>"
        f"<table><tr>{head}</tr>{''.join(_turn(i, turn, row) for i, turn in turns)}</table></section>"
    )


def _classed(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _tokens(row: Mapping[str, Any]) -> Iterable[str]:
    columns = (row[name] for name in ("tokens", "mask", "logprobs", "versions", "advantages"))
    for place, (text, mask, logprob, version, advantage) in enumerate(zip(*columns, strict=True)):
        shown = html.escape(text.replace("\n", "\u23ce\n"))
        if not mask:
            yield f'<span class="environment" title="token {place}: the environment&#39;s">{shown}</span>'
            continue
        strength = min(1.0, abs(logprob / WORST))
        sign = _classed("more" if advantage > 0 else "less" if advantage < 0 else "")
        about = f"token {place}: log-prob {logprob:g}, version {version}, advantage {advantage:g}"
        style = f"background: rgba(220, 60, 40, {strength:.2f})"
        yield f'<span{sign} style="{style}" title="{about}">{shown}</span>'


def _turn(number: int, turn: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    own = slice(turn["start"], turn["end"])
    cells = [
        "reset" if number == 0 else str(number),
        turn["said"],
        turn["answer"] or turn["failed"],
        f"{turn['reward']:g}",
        _mean(row["advantages"][own]),
        _mean(row["logprobs"][own]),
        ", ".join(map(str, sorted(set(row["versions"][own])))),
    ]
    kinds = TURN_COLUMNS.values()
    told = (f"<td{_classed(kind)}>{html.escape(c)}</td>" for c, kind in zip(cells, kinds, strict=True))
    return f"<tr>{''.join(told)}</tr>"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else ""
