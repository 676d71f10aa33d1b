"""Does a program's output answer the test? The standard checkers of contests, by their names in testlib.

fcmp    files line by line            lcmp    lines, blanks within them counting once
wcmp    words                         ncmp    whole numbers
rcmp4, rcmp6, rcmp9                   numbers within 1e-4, 1e-6, 1e-9, absolute or relative
yesno, nyesno                         YES or NO in any case, one or many
words   the default where a problem has no checker: words; YES and NO in any case; 1e-6 for words that look
        like decimals in the expected output
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_DECIMAL = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?|[+-]?\d+[eE][+-]?\d+", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_YES_NO = ("yes", "no")


def close(expected: float, got: float, tolerance: float) -> bool:
    """Within the tolerance, absolute or relative to what is expected. Nan equals nan; infinities by sign."""
    if math.isnan(expected):
        return math.isnan(got)
    if math.isinf(expected) or math.isinf(got) or math.isnan(got):
        return expected == got
    # The small slack is for the rounding of the bounds themselves.
    return abs(got - expected) <= tolerance * max(1.0, abs(expected)) + 1e-15


def fcmp(output: str, expected: str) -> bool:
    ours, theirs = (text.rstrip("\n").split("\n") for text in (output, expected))
    return [line.rstrip("\r") for line in ours] == [line.rstrip("\r") for line in theirs]


def lcmp(output: str, expected: str) -> bool:
    ours, theirs = ([line.split() for line in text.strip().split("\n")] for text in (output, expected))
    return ours == theirs


def wcmp(output: str, expected: str) -> bool:
    return output.split() == expected.split()


def ncmp(output: str, expected: str) -> bool:
    ours, theirs = output.split(), expected.split()
    whole = all(_INTEGER.fullmatch(word) for word in ours)
    return whole and len(ours) == len(theirs) and [w.lstrip("+") for w in ours] == theirs


def rcmp(tolerance: float) -> Callable[[str, str], bool]:
    """The checker for numbers within `tolerance`."""

    def check(output: str, expected: str) -> bool:
        ours, theirs = output.split(), expected.split()
        try:
            return len(ours) == len(theirs) and all(
                close(float(b), float(a), tolerance) for a, b in zip(ours, theirs, strict=True)
            )
        except ValueError:
            return False

    return check


def nyesno(output: str, expected: str) -> bool:
    ours, theirs = output.lower().split(), expected.lower().split()
    return ours == theirs and all(word in _YES_NO for word in ours)


def yesno(output: str, expected: str) -> bool:
    return len(output.split()) == 1 and nyesno(output, expected)


def words(output: str, expected: str) -> bool:
    ours, theirs = output.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(got: str, expected: str) -> bool:
    if got == expected:
        return True
    if expected.lower() in _YES_NO:
        return got.lower() == expected.lower()
    if not _DECIMAL.fullmatch(expected):
        return False
    try:
        return close(float(expected), float(got), 1e-6)
    except ValueError:
        return False


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "fcmp": fcmp,
    "lcmp": lcmp,
    "wcmp": wcmp,
    "ncmp": ncmp,
    "rcmp4": rcmp(1e-4),
    "rcmp6": rcmp(1e-6),
    "rcmp9": rcmp(1e-9),
    "yesno": yesno,
    "nyesno": nyesno,
    "words": words,
}
"""check(output, expected) by name."""

RUN_CHECKER = """
import json, os, runpy, sys
given = json.loads(sys.stdin.read())
os.makedirs("/tmp/check", exist_ok=True)
for name, text in given["files"].items():
    with open("/tmp/check/" + name, "w") as file:
        file.write(text)
sys.argv = ["checker.py", *("/tmp/check/" + name for name in ("input", "expected", "output"))]
runpy.run_path("/tmp/check/checker.py", run_name="__main__")
"""
"""Runs a problem's own checker in the sandbox: `checker.py INPUT EXPECTED OUTPUT`, which prints 1 or 0."""
