r"""Numbers as people write them, read exactly: 1,234 and 2\frac{1}{2}, 50\% and 1.2 \times 10^5.

Exactly, because floats and absolute tolerances call 2.88e-19 and 3.88e-19 equal, and 20-digit integers too.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MOST_DIGITS = 4000
"""Python refuses to read longer integers (4,300 digits)."""
ROUNDED_DIGITS = 6
"""A decimal with so many significant digits stands for what rounds to it."""

_UNSIGNED = r"(?:\d+\.?\d*|\.\d+)"
_POWER = r"\^(?:\{([+-]?\d{1,6})\}|(\d))"
_DECIMAL = re.compile(rf"({_UNSIGNED})(?:[eE]([+-]?\d{{1,6}}))?", re.ASCII)
_SCIENTIFIC = re.compile(rf"(?:({_UNSIGNED})(?:\\times|\\cdot|\*|x))?10{_POWER}", re.ASCII)
_INTEGER_POWER = re.compile(rf"(\d{{1,20}}){_POWER}", re.ASCII)
_FRACTION = re.compile(
    rf"(\d*)\\frac\{{([+-]?{_UNSIGNED})\}}\{{([+-]?{_UNSIGNED})\}}|({_UNSIGNED})/([+-]?{_UNSIGNED})", re.ASCII
)
_MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)", re.ASCII)


class Numeral(NamedTuple):
    """A number that was read."""

    value: Fraction
    decimals: int | None = None
    """Digits after the point, of a decimal number. None for what is exact as written."""
    significant: int = 0
    """Significant digits of a decimal number."""


def numeral(text: str) -> Numeral | None:
    r"""The number that cleaned LaTeX is. None when it is something else, or too large to compare.

    Examples: "25.0" is 25. r"2\frac{1}{2}" and "2 1/2" are 5/2, never 2 times 1/2.
    """
    if len(text) > MOST_DIGITS:
        return None
    sign, rest = 1, text.strip()
    while rest[:1] in ("+", "-"):
        sign, rest = (-sign if rest[0] == "-" else sign), rest[1:].lstrip()
    if rest.startswith("(") and rest.endswith(")") and rest.count("(") == 1:
        rest = rest[1:-1].strip()
        if rest[:1] == "-":
            sign, rest = -sign, rest[1:]
    try:
        found = _unsigned(rest)
    except (ZeroDivisionError, ValueError):
        return None
    return None if found is None else found._replace(value=sign * found.value)


def _unsigned(text: str) -> Numeral | None:
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = map(int, match.groups())
        return Numeral(whole + Fraction(top, bottom))
    text = re.sub(r"\s+", "", text)
    if match := _DECIMAL.fullmatch(text):
        return _decimal(match.group(1), int(match.group(2) or 0))
    if match := _SCIENTIFIC.fullmatch(text):
        return _decimal(match.group(1) or "1", int(match.group(2) or match.group(3)))
    if match := _FRACTION.fullmatch(text):
        before, *either = match.groups()
        above, below = (one for one in either if one is not None)
        return Numeral(int(before or 0) + Fraction(above) / Fraction(below))
    if match := _INTEGER_POWER.fullmatch(text):
        base, exponent = int(match.group(1)), int(match.group(2) or match.group(3))
        if len(match.group(1)) * abs(exponent) <= MOST_DIGITS:
            return Numeral(Fraction(base) ** exponent)
    return None


def _decimal(digits: str, exponent: int) -> Numeral | None:
    if abs(exponent) > MOST_DIGITS:
        return None
    value = Fraction(digits) * Fraction(10) ** exponent
    _, point, places = digits.partition(".")
    if not point and exponent >= 0:
        return Numeral(value)
    significant = len(digits.replace(".", "").lstrip("0"))
    return Numeral(value, len(places) - exponent, significant)


def equal_numerals(a: Numeral, b: Numeral) -> bool:
    """Equal exactly, or one is a long decimal (6 significant digits or more) that the other rounds to.

    0.0833333 equals 1/12, 0.083 does not. 1e-9 is not 0.
    """
    if a.value == b.value:
        return True
    return _rounds_to(a, b) or _rounds_to(b, a)


def _rounds_to(decimal: Numeral, other: Numeral) -> bool:
    if decimal.decimals is None or decimal.significant < ROUNDED_DIGITS:
        return False
    return abs(decimal.value - other.value) * 2 <= Fraction(10) ** -decimal.decimals
