"""What a benchmark is made of: problems, how they are sampled, and who grades the answers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem of a suite."""

    problem_id: str
    """Its name in the published data: results of two models are paired by it."""
    messages: tuple[Message, ...]
    """What the model is asked, as chat messages."""
    gold: Any
    """What the grader needs: the answer, or the tests."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the published row says besides, as far as a report needs it: date, contest, difficulty."""

    @property
    def text(self) -> str:
        """The messages as one text."""
        return "\n\n".join(str(message["content"]) for message in self.messages)


class Outcome(NamedTuple):
    """What the grader found about one completion."""

    correct: bool
    answer: str = ""
    """What was read from the completion: a final answer, or a program."""
    why: str = ""
    """Why it is not correct: no answer | wrong | time | error | ...; empty when it is."""
    detail: Mapping[str, Any] = {}
    """Of a failed test: its input, what was expected, what came. Of a reward: `reward`."""


class Grader(Protocol):
    """Grades completions."""

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """The outcome of every (problem, completion), in order. May be called any number of times.

        Raises what is no verdict: a sandbox or a service that is down.
        """
        ...

    def close(self) -> None:
        """Ends what the grader started. A second call does nothing."""
        ...


class Tried(NamedTuple):
    """A problem and what became of its completions, in the order in which they were sampled."""

    problem: Problem
    correct: tuple[bool, ...]


@dataclass(frozen=True)
class Suite:
    """One benchmark, ready to run."""

    name: str
    """Its name in metrics and folders."""
    problems: tuple[Problem, ...]
    grader: Grader
    samples: int
    """Completions per problem."""
    temperature: float
    top_p: float
    max_tokens: int | None = None
    """Longest completion. None: rollout.max_completion_tokens."""
    notes: tuple[str, ...] = ()
    """What a reader of the figure must know: files, rules, what was left out."""
    more: Callable[[Sequence[Tried]], Mapping[str, Any]] = lambda tried: {}
    """Further figures of the suite: numbers are logged as eval/SUITE/NAME, the rest stands in the result."""

    rules: Mapping[str, Any] = field(default_factory=dict)
    """Options of the grader that change a verdict."""

    @functools.cached_property
    def content(self) -> str:
        """16 hex digits over what is asked and what is right: another file or instruction has others."""
        digest = hashlib.blake2b(digest_size=8)
        for problem in self.problems:
            digest.update(repr((problem.problem_id, problem.messages, problem.gold)).encode())
        return digest.hexdigest()

    def setting(self) -> dict[str, Any]:
        """What must be equal for two sets of samples to belong together."""
        return {
            "suite": self.name,
            "problems": [problem.problem_id for problem in self.problems],
            "content": self.content,
            "rules": dict(self.rules),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "samples": self.samples,
        }


@dataclass(frozen=True)
class SuiteResult:
    """What a finished suite found: the content of its result.json."""

    suite: str
    metrics: Mapping[str, float]
    """Figure -> value, without the prefix eval/SUITE/."""
    details: Mapping[str, Any]
    """Further findings, such as the rating of each contest."""
    notes: tuple[str, ...]
    setting: Mapping[str, Any]
    samples: tuple[Mapping[str, Any], ...]
    """Every sample: problem, sample, correct, why, answer, completion, tokens, finish_reason, detail."""

    def logged(self) -> dict[str, float]:
        """The figures under their public names, such as eval/aime24/avg@32."""
        return {f"eval/{self.suite}/{name}": value for name, value in self.metrics.items()}
