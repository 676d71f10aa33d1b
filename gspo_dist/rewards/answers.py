"""Answers of data records, as the built-in rewards read them: a text, a number, or a list of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""A number as people and JSON write it.
Decimal alone would also take 1_000, nan and other scripts' digits."""


def alternatives(answer: Any) -> list[Any]:
    """A list means that any of its answers is right; all else is one answer."""
    return list(answer) if isinstance(answer, (list, tuple)) else [answer]


def is_number(answer: Any) -> bool:
    """Whether an answer is a number and no text; bool is none, although Python counts with it."""
    return isinstance(answer, (Real, Decimal)) and not isinstance(answer, bool)


def number_in(text: str) -> Decimal | None:
    """The number that `text` is, exactly; None when it is something else."""
    if NUMBER.fullmatch(text) is None:
        return None
    try:
        return Decimal(text)
    except ArithmeticError:  # an exponent of more than 18 digits
        return None


def check_answer(answer: Any) -> None:
    """Raises ValueError for an answer that no completion could give, or that does not say what is right."""
    rule = "an answer must be a text, a number, or a list of them (any of which is right)"
    if isinstance(answer, Mapping):
        fields = ", ".join(map(str, answer)) or "none"
        raise ValueError(f"{rule}: got a mapping with the fields {fields}; write one of them as the answer")
    if not alternatives(answer):
        raise ValueError(f"{rule}: got an empty list; remove the record")
    for one in alternatives(answer):
        if is_number(one):
            if not math.isfinite(one):
                raise ValueError(f"{rule}: got {one!r}, which no completion equals; remove the record")
        elif not isinstance(one, str):
            raise ValueError(
                f"{rule}: got {one!r} of type {type(one).__name__}; write it as the text that is right"
            )
        elif not one.strip():
            raise ValueError(f"{rule}: got the empty text {one!r}; remove the record or give its answer")
