"""Python in the sandbox, as a tool and as an environment: what is printed, and what fails."""

from __future__ import annotations

import functools

import pytest

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments import python as module
from gspo_dist.environments.protocol import ToolFailure
from gspo_dist.environments.python import Python, python, run
from gspo_dist.environments.resolve import resolve
from gspo_dist.environments.tools import ToolEnvironment, tool_of
from gspo_dist.sandbox import choose
from gspo_dist.sandbox.protocol import Limits, Outcome, SandboxError
from gspo_dist.types import Prompt


class Recorded:
    """A sandbox that says what it is told to say, and keeps what it was given."""

    def __init__(self, outcome) -> None:
        self.outcome, self.given = outcome, []

    def open(self, program, limits):
        self.given.append((program.code, limits))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.given.append("closed")

    def run(self, text):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def says(monkeypatch):
    def chosen(outcome):
        sandbox = Recorded(outcome)
        monkeypatch.setattr(module, "_sandbox", lambda name: sandbox)
        return sandbox

    return chosen


@pytest.mark.parametrize(
    ("outcome", "text", "is_ok"),
    [
        (Outcome("ok", "42\n"), "42", True),
        (Outcome("ok", " 1\n\n2\n\n"), " 1\n\n2", True),
        (Outcome("ok", "Error (mine): caught\n"), "Error (mine): caught", True),
        (Outcome("error", "1\n", "Traceback\nKeyError: 'x'\n"), "1\nError (error): KeyError: 'x'", False),
        (Outcome("time"), "Error (time): time", False),
    ],
)
def test_what_is_printed_is_the_answer_and_a_failure_is_told(says, outcome, text, is_ok) -> None:
    sandbox = says(outcome)
    assert run("code") == (text, is_ok)
    assert python("code") == text
    assert sandbox.given == [("code", Limits(time_s=6.0, memory_mb=512)), "closed"] * 2


def test_an_episode_runs_what_ends_with_a_semicolon_within_its_own_limits(says) -> None:
    sandbox = says(Outcome("ok", "Error (mine): caught\n"))
    env = Python("process", time_s=2.0, memory_mb=64)
    assert env.reset(Prompt("p", (1,), "q"), 0) is None
    told = env.step("print('Error (mine): caught');")
    assert (told.text, told.done) == ("Error (mine): caught", False)
    assert told.parts == {"tool_calls": 1.0, "tool_errors": 0.0}  # it printed that, and did not fail
    assert sandbox.given[0] == ("print('Error (mine): caught');", Limits(time_s=2.0, memory_mb=64))
    sandbox.outcome = Outcome("error", stderr="NameError: x")
    told = env.step("x;")
    assert (told.text, told.parts["tool_errors"]) == ("?", 1.0)
    assert env.step("It is 42.").done
    assert len(sandbox.given) == 4  # the last turn is no program


def test_a_sandbox_that_fails_is_no_answer_of_the_program(says) -> None:
    says(SandboxError("the service is down"))
    with pytest.raises(SandboxError, match="the service is down"):
        Python().step("print(1);")
    env = ToolEnvironment([tool_of(python)], "hermes")
    with pytest.raises(ToolFailure, match="the sandbox failed: the service is down"):
        env.step('<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>')


@pytest.mark.parametrize("knobs", [{"tools": ("python",)}, {"factory": "python"}])
def test_a_host_without_a_sandbox_says_so_before_the_run(monkeypatch, knobs) -> None:
    monkeypatch.setattr(choose, "refusal", lambda name: "no namespaces")
    module._sandbox.cache_clear()
    with pytest.raises(ValueError, match=r"bubblewrap: no namespaces.*Install bubblewrap"):
        resolve(EnvironmentConfig(**knobs))


@pytest.mark.slow
def test_programs_run_in_a_sandbox_of_this_host() -> None:
    """No room of its own, so that every host gives it. tests/unit/sandbox has what the strong ones hide."""
    here = functools.partial(run, sandbox="process")
    assert here("print(6 * 7)") == ("42", True)
    assert here("print(1)\nraise KeyError('x')") == ("1\nError (error): KeyError: 'x'", False)
    assert here("while True: pass", limits=Limits(time_s=0.5)) == ("Error (time): time", False)
    env = Python("process")
    assert env.step("print(6 * 7);").text == "42"
    assert env.step("print(x);").text == "?"  # nothing is kept between turns
