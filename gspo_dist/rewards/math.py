"""Reward 1 when the completion's final answer equals the prompt's as mathematics (math-verify), else 0."""

from __future__ import annotations

import functools
import re
from typing import Any

from gspo_dist.rewards import answers
from gspo_dist.rewards.answers import alternatives, number_in
from gspo_dist.types import Completion, Prompt

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_LINE = re.compile(r"(?i)^\W*(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*:?|:|=)\s*\W*?(?=\S)")


def math(
    prompt: Prompt, completion: Completion, *, boxed_only: bool = False
) -> tuple[float, dict[str, float]]:
    r"""Takes the answer from the last \boxed{...} or, unless `boxed_only`, from the last line, and compares.

    Equal means equal as mathematics: 033 and 33, 1/2 and 0.5, x+1 and 1+x. Of a list, any answer is right.
    Parts: `answered`, whether there was an answer to read.

    Raises ValueError when the prompt's own answer cannot be read: the data is wrong, not the model.
    """
    golds = [_gold(answer) for answer in alternatives(prompt.answer)]
    found = final_answer(completion.text, boxed_only=boxed_only)
    if found is None:
        return 0.0, {"answered": 0.0}
    expression = _parse(_as_latex(found))
    return float(any(_verify(gold, expression) for gold in golds)), {"answered": 1.0}


def final_answer(text: str, *, boxed_only: bool = False) -> str | None:
    r"""The content of the last whole \boxed{...}; without one, the last line with text, less "Answer:".

    Example: r"so \boxed{\frac{1}{2}}." gives r"\frac{1}{2}"; "...\nAnswer: 42" gives "42".
    """
    for match in reversed(list(_BOXED.finditer(text))):
        content = _balanced(text, match.end())
        if content is not None:
            return content.strip() or None
    if boxed_only:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    return _ANSWER_LINE.sub("", lines[-1]).strip() or None


def check_answer(answer: Any) -> None:
    """Raises ValueError for an answer that `math` cannot read. A plain number costs nothing to check."""
    answers.check_answer(answer)
    for one in alternatives(answer):
        if number_in(str(one)) is None:
            _gold(one)


def check_options(boxed_only: bool = False) -> None:
    """Raises ValueError when the verifier is not installed or an option has no meaning."""
    if not isinstance(boxed_only, bool):
        raise ValueError(f"reward.options.boxed_only must be true or false: got {boxed_only!r}")
    _math_verify()


def _gold(answer: Any) -> list[Any]:
    gold = _parse(_as_latex(str(answer)))
    if not gold:
        raise ValueError(f"the prompt's answer must be a mathematical expression: got {answer!r}")
    return gold


def _balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes one opened just before; None when it is never closed."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at]
        at += 1
    return None


def _as_latex(answer: str) -> str:
    """In the form in which math-verify reads any expression; bare text it only searches for numbers."""
    marked = "$" in answer or "\\(" in answer or "\\[" in answer or _BOXED.search(answer)
    return answer if marked else f"\\boxed{{{answer}}}"


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ValueError("reward.function math needs math-verify: pip install 'gspo-dist[math]'") from error
    return math_verify


# math-verify 0.9.0 keeps its deadlines with SIGALRM, which only a main thread may use: elsewhere it raises.
# Both are turned off, because evaluations may judge in threads; in a run the deadline is reward.timeout_s.
def _parse(text: str) -> list[Any]:
    return _math_verify().parse(text, parsing_timeout=None)


def _verify(gold: list[Any], found: list[Any]) -> bool:
    return bool(found) and bool(_math_verify().verify(gold, found, timeout_seconds=None))
