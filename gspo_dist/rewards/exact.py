"""Reward 1 when the answer stands in the completion exactly, else 0."""

from __future__ import annotations

import re

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

    pattern: a regular expression; its last match in the text counts, and of that its first group, if it has one.
    strip: leave out white space at both ends of both sides. Parts: `answered`, 0 when the pattern finds nothing.
    Example: pattern r"#(\\d+)$" takes "95" from "15,09#95".
    """
    found: str | None = completion.text
    if pattern is not None:
        found = last_match(pattern, completion.text)
    if found is None:
        return 0.0, {"answered": 0.0}
    wanted = str(prompt.answer)
    if strip:
        found, wanted = found.strip(), wanted.strip()
    if ignore_case:
        found, wanted = found.casefold(), wanted.casefold()
    return float(found == wanted), {"answered": 1.0}


def last_match(pattern: str, text: str) -> str | None:
    """The first group (or the whole, without groups) of the last match of `pattern` in `text`; None without one."""
    match = None
    for match in re.finditer(pattern, text):
        pass
    if match is None:
        return None
    return match.group(1) if match.re.groups else match.group(0)


def check_options(pattern: str | None = None, strip: bool = True, ignore_case: bool = False) -> None:
    """Raises ValueError for values that `exact_match` could not work with."""
    for name, value in (("strip", strip), ("ignore_case", ignore_case)):
        if not isinstance(value, bool):
            raise ValueError(f"reward.options.{name} must be true or false: got {value!r}")
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"reward.options.pattern must be a regular expression: got {pattern!r}: {error}"
        ) from error
