"""Small suites and files in the published formats, made by hand."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gspo_dist.evaluation.problem import Outcome, Problem, Suite
from gspo_dist.evaluation.samplers import Answer, Ask


def contest(points: bool, people: int = 240) -> dict[str, Any]:
    """A contest's stored answers: 240 participants, problems A to E, with points or without."""
    rows = []
    for i in range(people):
        score = max(7000 - 29 * i, 0) if points else 6 - i * 6 // people
        rows.append(
            {
                "party": {"members": [{"handle": f"h{i}"}]},
                "points": float(score),
                "penalty": 0 if points else 30 + i * 7 % 300,
            }
        )
    if not points:
        rows.sort(key=lambda row: (-row["points"], row["penalty"]))
    number = 1971 if points else 1972
    problems = [
        {"contestId": number, "index": letter, **({"points": 500.0 * (k + 1)} if points else {})}
        for k, letter in enumerate("ABCDE")
    ]
    changes = [{"handle": f"h{i}", "oldRating": 3000 - i * 37 % 2200} for i in range(people)]
    return {
        "standings": {"status": "OK", "result": {"problems": problems, "rows": rows}},
        "rating_changes": {"status": "OK", "result": changes},
    }


def packed_tests(tests: Any) -> str:
    """Private tests as LiveCodeBench publishes them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def livecodebench_row(name: str, date: str, **changes: Any) -> dict[str, Any]:
    """A row that asks for the sum of two numbers."""
    return {
        "question_title": name.title(),
        "question_content": f"Add two numbers ({name}).",
        "platform": "atcoder",
        "question_id": name,
        "contest_id": "abc1",
        "contest_date": date,
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": packed_tests([{"input": "20 22\n", "output": "42\n", "testtype": "stdin"}]),
        "metadata": "{}",
    } | changes


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def block(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\n"


class Exact:
    """Right where the text is the gold; remembers what it graded."""

    def __init__(self) -> None:
        self.graded: list[str] = []
        self.closed = 0

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        self.graded += [text for _, text in items]
        return [Outcome(text == p.gold, text, "" if text == p.gold else "wrong") for p, text in items]

    def close(self) -> None:
        self.closed += 1


def suite(count: int = 3, samples: int = 2, name: str = "own", **changes: Any) -> Suite:
    """Problems p0, p1, ..., whose gold is "1"."""
    problems = tuple(
        Problem(f"p{i}", ({"role": "user", "content": f"question {i}"},), "1", {"difficulty": "easy"})
        for i in range(count)
    )
    return Suite(name, problems, Exact(), samples, 0.5, 0.9, **changes)


class Table:
    """Answers from a table (problem, sample) -> text, one at a time; may break after so many."""

    name = "table"

    def __init__(self, texts: dict[tuple[str, int], str], breaks_after: int | None = None) -> None:
        self.texts, self.breaks_after = texts, breaks_after
        self.asked: list[tuple[str, int]] = []

    def answers(self, suite: Suite, asks: Sequence[Ask]) -> Iterator[list[Answer]]:
        for count, ask in enumerate(asks):
            if count == self.breaks_after:
                raise RuntimeError("the power is gone")
            key = ask.problem.problem_id, ask.sample
            self.asked.append(key)
            text = self.texts.get(key, "0")
            yield [Answer(ask, text, len(text), "length" if len(text) > 1 else "stop")]
