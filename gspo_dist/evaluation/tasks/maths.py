r"""AIME, AMC, MATH-500 and GSM8K: a question, and a final answer to compare.

AIME answers are whole numbers from 0 to 999 and are compared as such: 033 is 33. The others are compared as
mathematics by the `math` reward, in a process of its own with a deadline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.config import RewardConfig
from gspo_dist.data.records import Record, read_file
from gspo_dist.evaluation.problem import Outcome, Problem
from gspo_dist.rewards.answers import alternatives, number_in
from gspo_dist.rewards.final_answer import final_answer
from gspo_dist.rewards.pool import LocalRewardPool
from gspo_dist.rewards.reward import check_answers
from gspo_dist.types import Completion, Prompt

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""Follows every question; what Qwen's own evaluations ask of their models."""

_DECORATION = re.compile(r"\\text\{[^{}]*\}|\^\{\\circ\}|\^?\\circ|°|\\[,;!: ]|[\s$,]|\.$")


def aime_number(text: str) -> int | None:
    r"""The whole number from 0 to 999 that an answer is, else None. "025" is 25; "336^\circ" is 336."""
    plain = _DECORATION.sub("", text.strip())
    number = number_in(plain.rpartition("=")[2])
    if number is None or number != number.to_integral_value() or not 0 <= number <= 999:
        return None
    return int(number)


class AimeGrader:
    """Compares whole numbers."""

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        return [self._one(problem, text) for problem, text in items]

    def _one(self, problem: Problem, text: str) -> Outcome:
        found = final_answer(text)
        if found is None:
            return Outcome(False, "", "no answer")
        number = aime_number(found)
        if number is None:
            return Outcome(False, found[:200], "no whole number from 0 to 999")
        right = number == aime_number(str(problem.gold))
        return Outcome(right, str(number), "" if right else "wrong")

    def close(self) -> None:
        pass


class RewardGrader:
    """Grades by a reward: `correct_at` or more is correct. Judged in processes, each with its deadline."""

    def __init__(self, config: RewardConfig, correct_at: float = 1.0) -> None:
        """The processes start with the first completions."""
        self.config, self.correct_at = config, correct_at
        self.pool: LocalRewardPool | None = None
        self.env: Mapping[str, str] = {}
        """Variables of the processes, beside this one's."""

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        if self.pool is None:
            self.pool = LocalRewardPool(self.config, self.env)
        verdicts = self.pool.judge([(-1, as_prompt(p), as_completion(text)) for p, text in items])
        outcomes = []
        for (_, text), verdict in zip(items, verdicts, strict=True):
            correct = verdict.reward >= self.correct_at
            late = next((name for name in ("timeout", "crash", "error") if verdict.parts.get(name)), "wrong")
            outcomes.append(
                Outcome(
                    correct,
                    (final_answer(text) or "")[:200],
                    "" if correct else late,
                    {"reward": verdict.reward, **verdict.parts},
                )
            )
        return outcomes

    def close(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.close()


def as_prompt(problem: Problem) -> Prompt:
    """The problem as a reward takes it; it has no tokens."""
    return Prompt(problem.problem_id, (0,), problem.text, problem.gold, dict(problem.metadata))


def as_completion(text: str) -> Completion:
    """The text as a reward takes it; it has no tokens."""
    none = np.zeros(0, np.int64)
    return Completion(
        none, none.astype(np.bool_), none.astype(np.float32), none.astype(np.int32), "stop", text
    )


ID_FIELDS = ("problem_id", "unique_id", "question_id", "task_id", "id", "idx")
"""Fields that name a row; without one it is named by its place."""


def read_problems(
    path: Path, ask: Callable[[str], str], prompt_key: str = "prompt", answer_key: str = "answer"
) -> tuple[Problem, ...]:
    """The rows of a file in any schema of the data room, the question's text put through `ask`.

    Raises ValueError for a row that is no record, and for two rows of one name.
    """
    problems = []
    for place, record in enumerate(read_file(str(path), prompt_key, answer_key, split="test")):
        name = next(
            (record.metadata[key] for key in ID_FIELDS if record.metadata.get(key) is not None), place
        )
        problems.append(Problem(str(name), asked(record, ask), record.answer, _short(record)))
    names = [problem.problem_id for problem in problems]
    if len(set(names)) < len(names):  # some files count within parts: "1" twice
        problems = [
            Problem(f"{place}:{p.problem_id}", p.messages, p.gold, p.metadata)
            for place, p in enumerate(problems)
        ]
    return tuple(problems)


def asked(record: Record, ask: Callable[[str], str]) -> tuple[dict[str, Any], ...]:
    """The record's messages, the last question put through `ask`."""
    if isinstance(record.question, str):
        return ({"role": "user", "content": ask(record.question)},)
    *before, last = record.question
    return (*before, {**last, "content": ask(str(last["content"]))})


def _short(record: Record) -> dict[str, Any]:
    """Fields that a report can use: short texts and numbers."""
    kept = {k: v for k, v in record.metadata.items() if isinstance(v, (int, float)) or k == "data_source"}
    return kept | {k: v for k, v in record.metadata.items() if isinstance(v, str) and len(v) <= 80}


def check_golds(problems: Sequence[Problem], grader: AimeGrader | RewardGrader) -> None:
    """Raises ValueError, naming the problem, for a published answer that the grader cannot read."""
    if isinstance(grader, RewardGrader):
        check_answers(grader.config, [as_prompt(problem) for problem in problems])
        return
    for problem in problems:
        if any(aime_number(str(one)) is None for one in alternatives(problem.gold)):
            raise ValueError(
                f"problem {problem.problem_id}: an AIME answer must be a whole number from 0 to 999: got "
                f"{problem.gold!r}; repair the file"
            )
