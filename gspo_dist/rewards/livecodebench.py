"""LiveCodeBench's rules: which code is taken, how outputs are compared, what runs before the program.

After github.com/LiveCodeBench/LiveCodeBench at 28fef95. Rules that surprise are kept, so that figures can be
compared; tests/unit/rewards/test_livecodebench.py has outputs of the published code.
"""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation

STARS = [
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
    "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing",
]  # fmt: skip
"""In this order: builtins late, so that pow, sum and open are the built-in ones."""
_MODULES = [name for name in STARS if name not in ("builtins", "typing")]
PREAMBLE = "".join([f"from {name} import *\n" for name in STARS] + [f"import {name}\n" for name in _MODULES])


def code_of(text: str) -> str:
    """The lines between the last two lines with three backticks; empty when there are fewer than two.

    So of a block that is cut off after a complete one, the prose between them is taken.
    """
    lines = text.split("\n")
    fences = [at for at, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else ""


def last_block(text: str) -> str:
    """The last block that was opened and closed, whatever follows it."""
    found, opened = "", None
    lines = text.split("\n")
    for at, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = at
            else:
                found, opened = "\n".join(lines[opened + 1 : at]), None
    return found


BLOCKS = {"livecodebench": code_of, "last_block": last_block}


def same_output(printed: str, expected: str) -> bool:
    """Line by line, each stripped: equal as text, or as lists of decimals, exactly.

    "7" equals "007" and "7.0". "0.333333333" is not "0.3333333333", nor "Yes" "YES". No line may be added.
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(a: str, b: str) -> bool:
    if a == b:
        return True
    left = _decimals(a)
    return left is not None and left == _decimals(b)


def _decimals(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def same_result(result: str, expected: str) -> bool:
    """A function's result against the expected one, both as JSON, with Python's ==: 2 is 2.0, True is 1.

    An inner tuple is marked in the result (sandbox.protocol.TUPLE), so that it equals no list.
    """
    try:
        return bool(json.loads(result) == json.loads(expected))
    except (ValueError, RecursionError):
        return False
