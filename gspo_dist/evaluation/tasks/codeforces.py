"""CodeForces problems judged on local tests with checkers, and the Elo of the attempts at their contests.

Two published forms are read: open-r1/codeforces (tests, checkers and limits as fields) and rllm's (limits
at the end of the text, names in a file beside it). Interactive problems and those that read files are left
out and counted, as by everybody who judges locally.
"""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_dist.data.formats import BadRow, file_rows
from gspo_dist.evaluation import elo
from gspo_dist.evaluation.checkers import CHECKERS, RUN_CHECKER
from gspo_dist.evaluation.problem import Outcome, Problem, Tried
from gspo_dist.evaluation.tasks.programs import failed
from gspo_dist.rewards.code_tests import ProblemTests, read_tests
from gspo_dist.rewards.livecodebench import last_block
from gspo_dist.sandbox.protocol import Limits, Program, Sandbox, SandboxError

INSTRUCTION = (
    "Solve the problem with a Python 3 program that reads standard input and writes standard output. "
    "Give the whole program in one block between ```python and ```."
)
CHECKER_S = 30.0
"""Seconds for a problem's own checker, whatever the limit of the problem."""
ORDERS = 32
"""Orders of the attempts for which the rating is computed beside the order in which they were sampled."""
_TIME, _MEMORY = re.compile(r"Time Limit:\s*(\d+)\s*ms"), re.compile(r"Memory Limit:\s*(\d+)\s*MB")
_INTERACTIVE = re.compile(r"interactive (?:problem|task)|\bInteraction:?\n", re.IGNORECASE)
_NAME = re.compile(r"(\d+)/?([A-Z]\d*)")


@dataclass(frozen=True)
class Task:
    """What judging one problem takes."""

    tests: ProblemTests
    time_s: float
    """The problem's own limit."""
    memory_mb: int
    checker: str = "words"
    """A name of `checkers.CHECKERS`, or the source of a Python checker."""

    @property
    def has_own_checker(self) -> bool:
        return self.checker not in CHECKERS


def read(path: Path, ids: Path | None) -> tuple[list[Problem], list[str]]:
    """(problems that can be judged here, notes). Raises ValueError, naming the place, for a row that is none.

    ids: a JSON list of names ("1971A") by position, for files whose rows have none; by default the list of
    the right length beside the file.
    """
    rows = list(file_rows(path))
    names = _names(path, ids, len(rows))
    problems, left_out = [], {"interactive": 0, "read from a file": 0}
    for place, (where, row) in enumerate(rows):
        if isinstance(row, BadRow):
            raise row
        text = row.get("problem") or row.get("description") or ""
        if row.get("interaction_format") or _INTERACTIVE.search(text):
            left_out["interactive"] += 1
        elif row.get("input_mode") == "file":
            left_out["read from a file"] += 1
        else:
            try:
                problems.append(_problem(row, names[place] if names else _name_of(row)))
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{where}: no CodeForces problem: {error}") from error
    if not problems:
        raise ValueError(f"{path} must hold problems that can be judged here: it has none")
    return problems, _notes(problems, left_out)


def _notes(problems: Sequence[Problem], left_out: Mapping[str, int]) -> list[str]:
    default = sum(problem.gold.checker == "words" for problem in problems)
    tests = [len(problem.gold.tests) for problem in problems]
    return [
        *(f"{count} problems left out: {why}" for why, count in left_out.items() if count),
        f"{default} of {len(problems)} problems have no checker: compared by words, YES and NO in any case, "
        "1e-6 for decimals. A problem with several right answers may then refuse one",
        f"tests per problem: {min(tests)} to {max(tests)}, median {statistics.median(tests):g}",
    ]


def _names(path: Path, ids: Path | None, rows: int) -> list[str]:
    for file in (
        [ids] if ids else sorted([*path.parent.glob("*ids*.json"), *path.parent.glob("metadata*.json")])
    ):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list) and len(found) == rows and all(isinstance(name, str) for name in found):
            return found
    if ids:
        raise ValueError(f"{ids} must be a JSON list of {rows} names, one for each problem of {path.name}")
    return []


def _name_of(row: Mapping[str, Any]) -> str:
    if row.get("contest_id") and row.get("index"):
        return f"{row['contest_id']}{row['index']}"
    match = _NAME.fullmatch(str(row.get("id", "")))
    if match is None:
        raise ValueError(
            "a problem must have a name such as 1971A: in id, in contest_id and index, or in a list of names "
            "(evaluation.options.codeforces.ids=FILE)"
        )
    return match.group(1) + match.group(2)


def _problem(row: Mapping[str, Any], name: str) -> Problem:
    tests = row.get("tests") or row.get("official_tests") or row.get("test_cases")
    text = str(row["problem"]) if "problem" in row else _statement(row)
    found_time, found_memory = _TIME.search(text), _MEMORY.search(text)
    time_s = row.get("time_limit") or (int(found_time.group(1)) / 1000 if found_time else 2.0)
    memory = row.get("memory_limit") or (int(found_memory.group(1)) if found_memory else 256)
    task = Task(read_tests(tests), float(time_s), int(memory), row.get("generated_checker") or "words")
    if row.get("checker") in CHECKERS:
        task = Task(task.tests, task.time_s, task.memory_mb, row["checker"])
    question = f"{text.strip()}\n\n{INSTRUCTION}"
    metadata = {"tests": len(task.tests), "rating": row.get("rating"), "own_checker": task.has_own_checker}
    return Problem(name, ({"role": "user", "content": question},), task, metadata)


def _statement(row: Mapping[str, Any]) -> str:
    """The statement from its fields."""
    parts = [str(row.get("title") or ""), str(row["description"])]
    for field, title in (("input_format", "Input"), ("output_format", "Output"), ("note", "Note")):
        if row.get(field):
            parts.append(f"{title}\n{row[field]}")
    for example in row.get("examples") or ():
        parts.append(f"Example input\n{example['input']}\nExample output\n{example['output']}")
    limits = f"Time limit: {row.get('time_limit')} s, memory limit: {row.get('memory_limit')} MB"
    return "\n\n".join([*parts, limits])


@dataclass(frozen=True)
class Judge:
    """Runs a program on the tests of its problem, up to the first that fails.

    The factors stand for Python in the place of C++, for which the limits are made.
    """

    sandbox: Sandbox
    time_factor: float
    memory_factor: float

    def __call__(self, problem: Problem, text: str) -> Outcome:
        """The outcome of one completion."""
        task, source = problem.gold, last_block(text)
        if not source.strip():
            return Outcome(False, "", "no code")
        # The interpreter itself must fit.
        memory_mb = max(64, int(task.memory_mb * self.memory_factor))
        limits = Limits(time_s=task.time_s * self.time_factor, memory_mb=memory_mb)
        with self.sandbox.open(Program(source), limits) as run:
            for at, (given, expected) in enumerate(zip(task.tests.inputs, task.tests.outputs, strict=True)):
                ended = run.run(given)
                why = ended.status if ended.status != "ok" else ""
                if not why and not self.accepts(task, given, expected, ended.stdout):
                    why = "wrong"
                if why:
                    return failed(source, task.tests, why, at, at=at, ended=ended)
        return Outcome(True, source)

    def accepts(self, task: Task, given: str, expected: str, output: str) -> bool:
        """What the problem's checker says of an output. Raises SandboxError where it gives no verdict."""
        if not task.has_own_checker:
            return CHECKERS[task.checker](output, expected)
        files = {"input": given, "expected": expected, "output": output, "checker.py": task.checker}
        limits = Limits(time_s=CHECKER_S, memory_mb=1024)
        with self.sandbox.open(Program(RUN_CHECKER), limits) as run:
            ended = run.run(json.dumps({"files": files}))
        if ended.status in ("killed", "time", "memory"):
            raise SandboxError(
                f"a problem's own checker gave no verdict ({ended.status}): {ended.stderr[-300:]}"
            )
        # A checker that ends with an error met an output that it cannot parse: that is a wrong answer.
        verdict = ended.stdout.split()
        return ended.status == "ok" and bool(verdict) and verdict[-1] == "1"


def contest_of(problem_id: str) -> str:
    """Example: "1972D1" is of contest "1972"."""
    match = _NAME.match(problem_id)
    return match.group(1) if match else ""


def ratings(
    tried: Sequence[Tried],
    contests: Mapping[str, elo.Contest],
    left_out: Mapping[str, str],
    table: Mapping[int, int] | None,
    table_name: str,
) -> dict[str, Any]:
    """The Elo of a suite's attempts: the mean over contests with standings, and what it is made of.

    The order of the attempts is the one in which they were sampled. It is one of many: `orders` tells the
    lowest, mean and highest rating over other orders.
    """
    attempts = {one.problem.problem_id: one.correct for one in tried}
    own = {c for c in contests if any(problem in attempts for problem in contests[c].points)}
    found = {name: elo.rating(contests[name], attempts) for name in sorted(own)}
    detail: dict[str, Any] = {
        "contests": found,
        "contests_left_out": dict(left_out),
        "ratings_table": table_name,
    }
    if not found:
        return detail
    mean = sum(found.values()) / len(found)
    detail |= {"elo": mean, "elo_contests": float(len(found))}
    if len(found) > 1:
        detail["elo_standard_error"] = statistics.stdev(found.values()) / len(found) ** 0.5
    if table:
        detail["elo_percentile"] = elo.percentile(mean, table)
    if any(len(correct) > 1 for correct in attempts.values()):
        others = [_mean_in_order(attempts, [contests[c] for c in found], seed) for seed in range(ORDERS)]
        detail["orders"] = {"low": min(others), "mean": sum(others) / ORDERS, "high": max(others)}
    return detail


def _mean_in_order(
    attempts: Mapping[str, Sequence[bool]], contests: Sequence[elo.Contest], seed: int
) -> float:
    draw = random.Random(seed)
    shuffled = {name: draw.sample(list(correct), len(correct)) for name, correct in attempts.items()}
    return sum(elo.rating(contest, shuffled) for contest in contests) / len(contests)
