"""Reward 1 when the answer stands in the completion exactly, else 0."""

from __future__ import annotations

import re
from typing import Any

from gspo_dist.checks import true_or_false
from gspo_dist.rewards.answers import alternatives, is_number, number_in
from gspo_dist.types import Completion, Prompt


def exact_match(
    prompt: Prompt,
    completion: Completion,
    *,
    pattern: str | None = None,
    strip: bool = True,
    ignore_case: bool = False,
) -> tuple[float, dict[str, float]]:
    """Compares the prompt's answer with the completion's text, or with what `pattern` finds in it.

    A text equals a text, letter for letter; a number equals every way to write it (42.0 and 42, 0.5 and
    5e-1). Of a list, any answer is right. Parts: `answered`, 0 when the pattern finds nothing.

    pattern: a regular expression. Its last match in the text counts, and of that its first group, if it has
    one. strip: leave out white space at both ends of both sides. ignore_case: capitals do not matter.

    Example: pattern r"#(\\d+)$" takes "95" from "15,09#95".
    """
    found = completion.text if pattern is None else last_match(pattern, completion.text)
    if found is None:
        return 0.0, {"answered": 0.0}
    if strip:
        found = found.strip()
    right = any(_equal(found, answer, strip, ignore_case) for answer in alternatives(prompt.answer))
    return float(right), {"answered": 1.0}


def _equal(found: str, answer: Any, strip: bool, ignore_case: bool) -> bool:
    if is_number(answer):
        number = number_in(found)
        return number is not None and number == number_in(str(answer))
    wanted = str(answer).strip() if strip else str(answer)
    return found.casefold() == wanted.casefold() if ignore_case else found == wanted


def last_match(pattern: str, text: str) -> str | None:
    """The first group of the last match of `pattern` in `text`; without groups the whole match,
    without one None.
    """
    *_, last = (None, *re.finditer(pattern, text))
    if last is None:
        return None
    return last.group(1) if last.re.groups else last.group(0)


def check_options(*, pattern: str | None, strip: bool, ignore_case: bool) -> None:
    """Raises ValueError for values that `exact_match` could not work with."""
    true_or_false("reward.options.strip", strip)
    true_or_false("reward.options.ignore_case", ignore_case)
    if pattern is not None:
        check_pattern(pattern)


def check_pattern(pattern: str) -> re.Pattern[str]:
    """The pattern, compiled. Raises ValueError where it is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"reward.options.pattern must be a regular expression: got {pattern!r}: {error}"
        ) from error
