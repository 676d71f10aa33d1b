"""A page of what went wrong: of each problem that was not always solved, one failure and its test."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from gspo_dist.evaluation.problem import Problem, SuiteResult

SHOWN = 200
"""Problems on a page."""
LONGEST = 20_000
"""Characters of a completion that are shown; its end is what counts."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6em; max-height: 30em; overflow: auto; }
summary { cursor: pointer; padding: .3em 0; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left; }
"""


def failures_page(result: SuiteResult, problems: Sequence[Problem]) -> str:
    """The page as HTML, whole in one file. Everything from model and data is escaped."""
    own: dict[str, list[Mapping[str, Any]]] = {}
    for sample in result.samples:
        own.setdefault(sample["problem"], []).append(sample)
    failed = [p for p in problems if not all(s["correct"] for s in own[p.problem_id])]
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{value:.4f}</td></tr>" for name, value in result.metrics.items()
    )
    notes = "".join(f"<li>{_text(note)}</li>" for note in result.notes)
    more = f"<p>The first {SHOWN} of {len(failed)}.</p>" if len(failed) > SHOWN else ""
    blocks = "".join(_block(problem, own[problem.problem_id]) for problem in failed[:SHOWN])
    return (
        f"<!doctype html><meta charset='utf-8'><title>{_text(result.suite)}</title><style>{STYLE}</style>"
        f"<h1>{_text(result.suite)}</h1><table>{rows}</table><ul>{notes}</ul>"
        f"<h2>{len(failed)} of {len(problems)} problems were not always solved</h2>{more}{blocks}\n"
    )


def _block(problem: Problem, samples: Sequence[Mapping[str, Any]]) -> str:
    right = sum(sample["correct"] for sample in samples)
    first = next(sample for sample in samples if not sample["correct"])
    parts = [("Prompt", problem.text), ("Completion", first["completion"][-LONGEST:])]
    if isinstance(problem.gold, (str, int, float, list)):
        parts.append(("Right answer", str(problem.gold)))
        parts.append(("Answer that was read", first["answer"]))
    names = {
        "input": "Input of the test that failed",
        "expected": "Expected",
        "got": "Got",
        "stderr": "stderr",
    }
    parts += [(title, str(first["detail"][key])) for key, title in names.items() if first["detail"].get(key)]
    inner = "".join(f"<h4>{title}</h4><pre>{_text(text)}</pre>" for title, text in parts)
    place = f", test {first['detail']['test'] + 1}" if "test" in first["detail"] else ""
    return (
        f"<details><summary><b>{_text(problem.problem_id)}</b>: {right} of {len(samples)} right; sample "
        f"{first['sample']}: {_text(first['why'])}{place}</summary>{inner}</details>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
