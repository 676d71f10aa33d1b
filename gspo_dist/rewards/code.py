"""Reward 1 when the program in a completion passes all tests of its problem, run in a sandbox, else 0."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

from gspo_dist.checks import above, at_least, choose, true_or_false
from gspo_dist.rewards.code_tests import ProblemTests, read_tests
from gspo_dist.rewards.livecodebench import BLOCKS, PREAMBLE, same_output, same_result
from gspo_dist.sandbox.choose import sandbox_named
from gspo_dist.sandbox.protocol import Limits, Outcome, Program, Sandbox
from gspo_dist.types import Completion, Prompt


class CodeVerdict(NamedTuple):
    """What was found about one program."""

    passed: int
    """Tests that it passed."""
    total: int
    """Tests that the problem has (or `max_tests`)."""
    why: str = ""
    """Of the first test that failed: no code | deadline | wrong, or the outcome's status."""
    failed_at: int | None = None
    """Its place among the tests."""
    outcome: Outcome | None = None
    """How it ended."""

    @property
    def solved(self) -> bool:
        return self.passed == self.total


def code(
    prompt: Prompt,
    completion: Completion,
    *,
    sandbox: str = "auto",
    sandbox_url: str | None = None,
    sandbox_kind: str = "sandboxfusion",
    block: str = "livecodebench",
    partial: bool = False,
    max_tests: int | None = None,
    time_s: float = 6.0,
    memory_mb: int = 512,
    deadline_s: float = 60.0,
) -> tuple[float, dict[str, float]]:
    """Runs the completion's code against the tests in the prompt's answer. Compares as LiveCodeBench does.

    sandbox, sandbox_url, sandbox_kind: gspo_dist/sandbox/README.md. block: `livecodebench` takes the lines
    between the last two fences, `last_block` the last block that was closed. partial: the reward is the share
    of tests passed, and all tests run. max_tests: only the first so many. time_s, memory_mb: per test.
    deadline_s: for all tests together. A program that has not passed by then fails.

    Parts: `answered` (whether there was code), `tests_passed` (the share), `time_limit` and `crashed` (1
    where the first failure was one). A sandbox that fails raises SandboxError: that is no verdict.
    """
    tests = read_tests(prompt.answer, function_name(prompt))
    source = BLOCKS[block](completion.text)
    place = _sandbox(sandbox, sandbox_url, sandbox_kind)
    limits = Limits(time_s=time_s, memory_mb=memory_mb)
    verdict = judge_code(
        source, tests, place, limits, max_tests=max_tests, go_on=partial, deadline_s=deadline_s
    )
    share = verdict.passed / verdict.total
    parts = {
        "answered": float(bool(source.strip())),
        "tests_passed": share,
        "time_limit": float(verdict.why in ("time", "deadline")),
        "crashed": float(verdict.why in ("error", "memory", "output", "files", "killed")),
    }
    return (share if partial else float(verdict.solved)), parts


def judge_code(
    source: str,
    tests: ProblemTests,
    sandbox: Sandbox,
    limits: Limits,
    *,
    max_tests: int | None = None,
    go_on: bool = False,
    deadline_s: float | None = None,
    preamble: str = PREAMBLE,
) -> CodeVerdict:
    """Runs the tests in order, up to the first that fails (`go_on`: all of them).

    An exit status other than 0 is an error, except after sys.exit(), which LiveCodeBench's runner swallows.
    Raises SandboxError when the sandbox fails.
    """
    total = min(len(tests), max_tests or len(tests))
    if not source.strip():
        return CodeVerdict(0, total, "no code", 0)
    if tests.asserts:
        return _judge_asserts(source, tests, sandbox, limits, preamble)
    passed, first = 0, CodeVerdict(0, total)
    until = None if deadline_s is None else time.monotonic() + deadline_s
    program = Program(source, tests.function, preamble, quiet_exit=True)
    with sandbox.open(program, limits) as run:
        for at in range(total):
            if until is not None and time.monotonic() >= until:
                if not first.why:
                    first = CodeVerdict(0, total, "deadline", at)
                break
            outcome = run.run(tests.inputs[at])
            why = failure(outcome, tests, at)
            passed += not why
            if why and not first.why:
                first = CodeVerdict(0, total, why, at, outcome)
            if why and (not go_on or outcome.status == "killed"):
                break
    return first._replace(passed=passed)


def failure(outcome: Outcome, tests: ProblemTests, at: int) -> str:
    """Why test `at` failed; empty when it passed."""
    if outcome.status != "ok":
        return outcome.status
    if tests.function is None:
        return "" if same_output(outcome.stdout, tests.outputs[at]) else "wrong"
    return "" if same_result(outcome.result or "null", tests.outputs[at]) else "wrong"


def _judge_asserts(
    source: str, tests: ProblemTests, sandbox: Sandbox, limits: Limits, preamble: str
) -> CodeVerdict:
    """A program that stops before the asserts has not passed them: then a mark is printed."""
    import secrets

    mark = secrets.token_hex(16)
    code = f"{source}\n\n{tests.asserts}\n\nprint({mark!r})\n"
    with sandbox.open(Program(code, None, preamble), limits) as run:
        outcome = run.run("")
    if outcome.status == "ok" and outcome.stdout.rstrip().endswith(mark):
        return CodeVerdict(1, 1)
    wrong = outcome.status == "ok" or "AssertionError" in outcome.stderr
    return CodeVerdict(0, 1, "wrong" if wrong else outcome.status, 0, outcome)


def function_name(prompt: Prompt) -> str | None:
    """The function that a record names beside its tests (metadata: fn_name, func_name)."""
    for name in ("fn_name", "func_name"):
        if isinstance(value := prompt.metadata.get(name), str) and value:
            return value
    return None


@functools.cache
def _sandbox(name: str, url: str | None, kind: str) -> Sandbox:
    return sandbox_named(name, url, kind, field="reward.options.sandbox")


def check_prompt(prompt: Prompt) -> None:
    """Raises ValueError for a record without tests that can be read."""
    read_tests(prompt.answer, function_name(prompt))


def check_answer(answer: Any) -> None:
    """As `check_prompt`, for an answer alone."""
    read_tests(answer)


def check_options(
    *,
    sandbox: str,
    sandbox_url: str | None,
    sandbox_kind: str,
    block: str,
    partial: bool,
    max_tests: int | None,
    time_s: float,
    memory_mb: int,
    deadline_s: float,
) -> None:
    """Raises ValueError for values without meaning, and where this host does not give the sandbox."""
    choose("reward.options.block", block, BLOCKS)
    true_or_false("reward.options.partial", partial)
    at_least("reward.options.max_tests", max_tests, 1)
    above("reward.options.time_s", time_s, 0)
    at_least("reward.options.memory_mb", memory_mb, 64)
    above("reward.options.deadline_s", deadline_s, 0)
    _sandbox(sandbox, sandbox_url, sandbox_kind)
