"""LiveCodeBench: the published rows, the window of contest dates, the official prompt and comparison.

After github.com/LiveCodeBench/LiveCodeBench at 28fef95. Programs run in a sandbox instead of the official
runner's process, which scores the same or slightly higher (rewards/README.md).
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import logging
import pickle
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gspo_dist.data.formats import BadRow, file_rows
from gspo_dist.evaluation.problem import Outcome, Problem
from gspo_dist.evaluation.tasks.programs import outcome
from gspo_dist.rewards.code import judge_code
from gspo_dist.rewards.code_tests import ProblemTests, read_tests
from gspo_dist.rewards.livecodebench import code_of
from gspo_dist.sandbox.protocol import Limits, Sandbox

log = logging.getLogger(__name__)

TIME_S, TIME_PER_TEST_S, TIME_MORE_S = 6.0, 7.0, 5.0
"""Seconds for one test; for all tests of a program 7 each and 5 more."""
MEMORY_MB = 4096
"""What a comment of the official code says; it sets no limit."""
LONGEST_TESTS = 2 << 30
"""Bytes that private tests may unpack to: a damaged row must not fill the memory."""

# The benchmark's own wording (MIT licence): a figure under another prompt is another figure.
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will "
    "generate a correct Python program that matches the specification and passes all tests. You will NOT "
    "return anything except for the program."
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code "
    "within delimiters."
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test "
    "on the sample inputs). Enclose your code within delimiters as follows."
)
FOR_THINKING = SYSTEM.removesuffix(" You will NOT return anything except for the program.")
"""Without the sentence that forbids reasoning, as Qwen3's report has it."""

RELEASES = {"v1": 400, "v2": 511, "v3": 612, "v4": 713, "v5": 880, "v6": 1055}
"""Problems of each release. Release vN is the files test.jsonl, test2.jsonl, ... testN.jsonl together."""

ERRATA = {
    "abc311_c", "abc326_d", "abc327_b", "abc333_e", "abc343_a", "abc343_e", "abc362_c", "arc185_c",
    "abc337_e", "abc355_e", "abc350_c", "arc189_a", "find-words-containing-character", "find-the-peaks",
    "generate-binary-strings-without-adjacent-zeros", "apply-operations-to-make-string-empty",
    "most-frequent-ids",
}  # fmt: skip
"""Problems that the benchmark's own errata name: several right answers, interactive, wrong tests. Published
figures include them, and so do these."""


class _Plain(pickle.Unpickler):
    """Unpickles plain values alone: a pickle that asks for a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}, and private tests are one text")


def private_tests(payload: str) -> list[dict[str, Any]]:
    """The private tests of a row: JSON text, or base64 of zlib of a pickle of that text.

    Raises ValueError for anything else, above all for a pickle with code in it.
    """
    try:
        found = json.loads(payload)
    except ValueError:
        try:
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(base64.b64decode(payload, validate=True), LONGEST_TESTS)
            if unpacker.unconsumed_tail:
                raise ValueError(f"they unpack to more than {LONGEST_TESTS >> 30} GiB")
            text = _Plain(io.BytesIO(raw)).load()
            found = json.loads(text)
        except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError, IndexError) as error:
            raise ValueError(f"private_test_cases must be tests: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"private_test_cases must be a list of tests: got {type(found).__name__}")
    return found


def tests_of(row: Mapping[str, Any]) -> ProblemTests:
    """Public tests, then private ones, in their order."""
    metadata = (
        json.loads(row["metadata"]) if isinstance(row.get("metadata"), str) else row.get("metadata", {})
    )
    return read_tests(
        [*json.loads(row["public_test_cases"]), *private_tests(row["private_test_cases"])],
        metadata.get("func_name"),
    )


def messages_of(row: Mapping[str, Any], *, thinking: bool) -> tuple[dict[str, Any], ...]:
    """The official chat prompt of a row."""
    starter = row.get("starter_code") or ""
    text = (
        f"### Question:\n{row['question_content']}\n\n"
        f"### Format: {WITH_STARTER if starter else WITHOUT_STARTER}\n"
        f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )
    system = FOR_THINKING if thinking else SYSTEM
    return ({"role": "system", "content": system}, {"role": "user", "content": text})


def in_window(date: str, start: str | None, end: str | None, rule: str) -> bool:
    """Whether a contest lies between two days.

    rule: `days` counts calendar days, both ends included. `official` compares moments, the end at 00:00, so a
    contest later on the last day is out. Example: 2025-02-28T06:30 until 2025-02-28 is in, and out.
    """
    held = datetime.datetime.fromisoformat(date)
    day = held.date().isoformat()
    if rule == "days":
        return (start is None or start <= day) and (end is None or day <= end)
    low, high = (datetime.datetime.fromisoformat(one) if one else None for one in (start, end))
    return (low is None or low <= held) and (high is None or held <= high)


def release_files(path: Path, release: str | None) -> list[Path]:
    """The files of a release in a folder of the published copy; one file as it is."""
    if path.is_file():
        return [path]
    number = int((release or "v6").removeprefix("v"))
    names = ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, number + 1))]
    missing = [name for name in names if not (path / name).is_file()]
    if missing and release:
        raise ValueError(
            f"livecodebench release {release} needs {', '.join(names)}: {path} lacks {missing[0]}"
        )
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise ValueError(f"{path} must hold test.jsonl, test2.jsonl, ...: it has none of them")
    return found


def read(
    files: Iterable[Path], *, start: str | None, end: str | None, rule: str, thinking: bool
) -> tuple[list[Problem], list[str]]:
    """(problems of the window, notes). Raises ValueError, naming file and line, for a row that is none."""
    problems, outside, errata = [], 0, 0
    for where, row in (pair for file in files for pair in file_rows(file)):
        if isinstance(row, BadRow):
            raise row
        try:
            if not in_window(row["contest_date"], start, end, rule):
                outside += 1
                continue
            tests = tests_of(row)
            date, kept = row["contest_date"], ("platform", "difficulty", "question_title", "contest_id")
            metadata = {"contest_date": date, "tests": len(tests), **{key: row.get(key) for key in kept}}
            name, messages = str(row["question_id"]), messages_of(row, thinking=thinking)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{where}: no row of LiveCodeBench: {type(error).__name__}: {error}") from error
        errata += bool({name, row.get("question_title", "").lower().replace(" ", "-")} & ERRATA)
        problems.append(Problem(name, messages, tests, metadata))
    window = f"{start or 'the beginning'} to {end or 'the end'} ({rule})"
    notes = [f"contest dates {window}: {len(problems)} problems, {outside} outside"]
    if not problems:
        raise ValueError(
            f"livecodebench has no problem in the window {window}: {outside} lie outside; set "
            "evaluation.options.livecodebench.start and .end, or null"
        )
    if errata:
        notes.append(f"{errata} problems stand in the benchmark's errata and are counted as published")
    return problems, notes


def judge(problem: Problem, text: str, *, sandbox: Sandbox) -> Outcome:
    """The outcome of one completion: its program run against the problem's tests."""
    source, tests = code_of(text), problem.gold
    deadline = TIME_PER_TEST_S * len(tests) + TIME_MORE_S
    limits = Limits(time_s=TIME_S, memory_mb=MEMORY_MB)
    return outcome(source, tests, judge_code(source, tests, sandbox, limits, deadline_s=deadline))
