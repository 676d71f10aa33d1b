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
body { font: 14px/1.5 sans-serif; margin: 2em auto; max-width: 70em; color: #222; }
.tokens { font-family: monospace; white-space: pre-wrap; word-break: break-all; line-height: 2; }
.tokens span { padding: 2px 1px; border-bottom: 2px solid transparent; }
.prompt { color: #888; }
.environment { background: #e8e8e8; color: #444; border-bottom-color: #999 !important; }
table { border-collapse: collapse; margin: .5em 0 2em; }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left; vertical-align: top; }
td { font-family: monospace; white-space: pre-wrap; }
h2 { margin-bottom: 0; } .facts { color: #555; margin-top: 0; }
"""


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
    if not chosen or not count:
        return []
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


def page_of(run_dir: Path, last: int = 5) -> str:
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
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>Sampled tokens are coloured by their "
        "log-prob: the redder, the less likely. Tokens of the environment are grey: they are read, and "
        "nothing is trained on them. Hold the pointer over a token for its numbers.</p>"
        f"{body}</body></html>\n"
    )


def _episode(row: Mapping[str, Any]) -> str:
    facts = [
        f"reward {row['reward']:g}",
        f"ended by {row['finish_reason']}",
        f"answer {row['answer']}",
        *(f"{name} {value:g}" for name, value in row["parts"].items()),
    ]
    turns = "".join(_turn(number, turn, row) for number, turn in enumerate(row["turns"]))
    return (
        f"<h2>Step {row['step']}, rollout {row['rollout_id']} of group {row['group_id']}</h2>"
        f'<p class="facts">{html.escape(", ".join(facts))}</p>'
        f'<div class="tokens"><span class="prompt">{html.escape(row["prompt"])}</span>'
        f"{''.join(_tokens(row))}</div>"
        "<table><tr><th>turn</th><th>the policy said</th><th>the environment answered</th><th>reward</th>"
        f"<th>log-prob, mean</th><th>versions</th></tr>{turns}</table>"
    )


def _tokens(row: Mapping[str, Any]) -> Iterable[str]:
    columns = (row[name] for name in ("tokens", "mask", "logprobs", "versions", "advantages"))
    for place, (text, mask, logprob, version, advantage) in enumerate(zip(*columns, strict=True)):
        shown = html.escape(text.replace("\n", "\u23ce\n"))
        if not mask:
            yield f'<span class="environment" title="token {place}: the environment&#39;s">{shown}</span>'
            continue
        strength = min(1.0, logprob / WORST)
        about = f"token {place}: log-prob {logprob:g}, version {version}, advantage {advantage:g}"
        yield f'<span style="background: rgba(220, 60, 40, {strength:.2f})" title="{about}">{shown}</span>'


def _turn(number: int, turn: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    own = slice(turn["start"], turn["end"])
    logprobs, versions = row["logprobs"][own], sorted(set(row["versions"][own]))
    mean = f"{sum(logprobs) / len(logprobs):.3f}" if logprobs else ""
    cells = [
        "reset" if number == 0 else str(number),
        turn["said"],
        turn["answer"] or turn["failed"],
        f"{turn['reward']:g}",
        mean,
        ", ".join(map(str, versions)),
    ]
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
