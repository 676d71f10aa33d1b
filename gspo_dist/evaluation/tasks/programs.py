"""What suites of programs share: completions judged side by side, and a failed test as an outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gspo_dist.evaluation.problem import Outcome, Problem
from gspo_dist.rewards.code import CodeVerdict
from gspo_dist.rewards.code_tests import ProblemTests
from gspo_dist.sandbox.protocol import Outcome as Ended

LONGEST = 2000
"""Characters of a test and of what came that are kept."""


class ProgramGrader:
    """Judges programs in a sandbox, some at a time. The threads wait while the sandbox works."""

    def __init__(self, judge: Callable[[Problem, str], Outcome], workers: int) -> None:
        """judge: the outcome of one completion of a problem."""
        self.judge = judge
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        return list(self.threads.map(lambda item: self.judge(*item), items))

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


def outcome(source: str, tests: ProblemTests, verdict: CodeVerdict) -> Outcome:
    """A verdict on a program as the outcome of a completion, with the test that failed."""
    if verdict.solved:
        return Outcome(True, source)
    return failed(
        source, tests, verdict.why or "wrong", verdict.passed, at=verdict.failed_at, ended=verdict.outcome
    )


def failed(
    source: str, tests: ProblemTests, why: str, passed: int, *, at: int | None, ended: Ended | None
) -> Outcome:
    """A program that failed. at: the place of its test, if one can be named. ended: how it ended there."""
    detail: dict[str, Any] = {"passed": passed, "tests": len(tests)}
    if at is not None and at < len(tests.inputs):  # asserts are one test without an input
        detail |= {"test": at, "input": tests.inputs[at][:LONGEST], "expected": tests.outputs[at][:LONGEST]}
    if ended is not None:
        detail |= {"got": (ended.result or ended.stdout)[:LONGEST], "stderr": ended.stderr[-1000:]}
    return Outcome(False, source, why, detail)
