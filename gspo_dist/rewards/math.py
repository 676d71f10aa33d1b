"""Reward 1 when the completion's final answer equals the prompt's as mathematics (math-verify), else 0."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from gspo_dist.checks import true_or_false
from gspo_dist.rewards import answers
from gspo_dist.rewards.answers import alternatives, is_number, number_in
from gspo_dist.rewards.equal import equal, readable
from gspo_dist.rewards.final_answer import final_answer
from gspo_dist.rewards.symbolic import math_verify
from gspo_dist.types import Completion, Prompt

_GSM8K = re.compile(r"(?m)^####[ \t]*(\S.*)$")


def math(
    prompt: Prompt, completion: Completion, *, boxed_only: bool = False, deadline_s: float = 5.0
) -> tuple[float, dict[str, float]]:
    r"""Takes the final answer where models mark it (final_answer.py), and compares it with the prompt's.

    `boxed_only` takes it from \boxed{...} alone. Equal means equal as mathematics: 033 and 33, 1/2 and 0.5,
    x+1 and 1+x, \{1,2\} and \{2,1\}. Of a list, any answer is right.

    Parts: `answered`, whether there was an answer to read. `undecided`, 1 where `deadline_s` of computing
    passed before it was compared; that scores 0. An alarm keeps this deadline, and cannot interrupt C code.
    The one that holds whatever happens is reward.timeout_s.

    Raises ValueError when the prompt's own answer cannot be read: the data is wrong, not the model.
    """
    golds = [_gold(answer) for answer in alternatives(prompt.answer)]
    found = final_answer(completion.text, boxed_only=boxed_only)
    if found is None:
        return 0.0, {"answered": 0.0}
    try:
        with _alarm(deadline_s):
            return float(any(equal(gold, found) for gold in golds)), {"answered": 1.0}
    except _Late:
        return 0.0, {"answered": 1.0, "undecided": 1.0}


class _Late(BaseException):
    """The alarm went off. No Exception: sympy catches those, and would go on."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises _Late inside the block after `seconds` of computing. Does nothing outside the main thread, where
    no alarm can be set.

    The clock of SIGVTALRM runs while this process computes: a busy host costs no answer, and alarms of others
    (SIGALRM) are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(signum: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_answer(answer: Any) -> None:
    """Raises ValueError for an answer that `math` cannot read. A plain number costs nothing to check."""
    answers.check_answer(answer)
    for one in alternatives(answer):
        if number_in(str(one)) is None:
            _gold(one)


def check_options(*, boxed_only: bool, deadline_s: float) -> None:
    """Raises ValueError when the verifier is not installed or an option has no meaning."""
    true_or_false("reward.options.boxed_only", boxed_only)
    if not is_number(deadline_s) or not 0 < deadline_s < 1e9:
        raise ValueError(f"reward.options.deadline_s must be seconds above 0: got {deadline_s!r}")
    math_verify()


def _gold(answer: Any) -> str:
    """The right answer as written; of a solution in GSM8K's form, what follows its last ####."""
    text = str(answer)
    if solution := _GSM8K.findall(text):
        text = solution[-1]
    if not readable(text):
        raise ValueError(f"the prompt's answer must be a mathematical expression: got {answer!r}")
    return text
