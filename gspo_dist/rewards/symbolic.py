r"""Expressions and equations, by math-verify and by numbers.

math-verify 0.9.0 says yes too often: its tolerance is absolute, it reads past functions such as gcd, and it
loses subscripts. So numbers must confirm what it says. What it would compute for minutes is refused unread.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")

_CALCULUS = re.compile(r"\\(?:[io]?int|sum|prod|lim|limsup|liminf)(?![A-Za-z])")
_OPAQUE = re.compile(r"\\(?:gcd|lcm|max|min|[pb]?mod|inf|sup)(?![A-Za-z])|(?<![A-Za-z])mod(?![A-Za-z])")
"""What math-verify 0.9.0 reads past: gcd(n, p - 1) is gcd(n, p - 6) there, and 1 mod 4 is 9 mod 4."""
_SUBSCRIPT = re.compile(r"([A-Za-z]|\\[A-Za-z]+)_\{?(\w+)\}?")
_LARGE = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\^\s*\{?\s*[-(]{0,2}\s*\d+\s*\^|[)}]\s*\^\s*\{?\s*-?\d{3,}|\d{4,}\s*[)}]?\s*!|!\s*[)}]?\s*[!^]"
    r"|\^[^!]{0,20}!|\\binom\s*\{\s*\d{5,}|\\binom\s*\{[^{}]*\^"
)
"""What sympy would compute for minutes, some of it in C code that no alarm interrupts: towers of powers,
large factorials, sums to a large power."""


def _false_when_it_raises(same: Callable[P, bool]) -> Callable[P, bool]:
    """Hostile and odd answers make sympy raise anything, a RecursionError too. They must not stop a run."""

    @functools.wraps(same)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            return same(*args, **kwargs)
        except Exception:
            return False

    return guarded


@_false_when_it_raises
def same_expression(gold: str, found: str) -> bool:
    """One expression each: math-verify's verdict, which numbers must confirm."""
    texts = (gold, found)
    if any(map(_refused, texts)):
        return False
    if not _comparable(*texts) or _subscripts(gold) != _subscripts(found):
        return False
    a, b = (_parse(text) for text in texts)
    if not a or not b or _one_has_unknowns(a[0], b[0]) or not _verify(a, b):
        return False
    return _close(a[0], b[0])


def _refused(text: str) -> bool:
    """What math-verify does not read, reads past, or computes for minutes."""
    if ":" in text or r"\ldots" in text or _nesting(text) > 25:
        return True
    return any(pattern.search(text) for pattern in (_OPAQUE, _CALCULUS, _LARGE))


def _comparable(gold: str, found: str) -> bool:
    """Words are not multiplied: math-verify reads "Yes" as Y times e times s."""
    return not any(
        re.search(r"(?<![\\A-Za-z])(?!sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|arc)[A-Za-z]{4,}", t)
        for t in (gold, found)
    )


def _subscripts(text: str) -> set[tuple[str, str]]:
    """Names with subscripts: math-verify reads E_0 and E_1 alike where a power follows."""
    return {one for one in _SUBSCRIPT.findall(text) if one[0] != r"\log"}


def _nesting(text: str) -> int:
    depth = most = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        most = max(most, depth)
    return most


def _one_has_unknowns(a: Any, b: Any) -> bool:
    """Told from the parsed trees, before anything is expanded: x - x + 42 is no final answer."""
    return bool(getattr(a, "free_symbols", ())) != bool(getattr(b, "free_symbols", ()))


def _close(a: Any, b: Any, up_to_factor: bool = False) -> bool:
    """Whether numbers confirm that two expressions are equal; True where they cannot tell.

    Unknowns get fixed positive values. The expressions must agree within a relative 1e-6. up_to_factor: one
    may be the other times a constant, as y - 2x - 1 and 2x - y + 1 are.
    """
    import sympy

    if not all(isinstance(one, sympy.Expr) for one in (a, b)):
        return True
    try:
        names = sorted({unknown.name for one in (a, b) for unknown in one.free_symbols})
        points = [[_value(one, names, shift) for one in (a, b)] for shift in (0.0, 0.1357, 0.2468)]
    except (TypeError, ValueError, OverflowError, ArithmeticError, AttributeError):
        return not up_to_factor
    if not up_to_factor:
        return all(_near(*point) for point in points)
    if not all(f and g for f, g in points):  # 1 = 1 is no equation times a constant
        return False
    (f, g), *others = points
    return all(_near(f * other_g, g * other_f) for other_f, other_g in others)


def _value(expression: Any, names: list[str], shift: float) -> complex:
    """The expression where the unknowns of these names are 0.7, 1.2, 1.7, ..., to the power 1 + shift.

    Powers, because points on a line would not tell y = 2x + 1 from y = 2x + 2 where the line has slope 2.
    """
    import sympy

    places = {
        unknown: (0.7 + 0.5 * names.index(unknown.name)) ** (1 + shift) for unknown in expression.free_symbols
    }
    return complex(sympy.N(expression.subs(places), 30))


def _near(left: complex, right: complex) -> bool:
    if left == right:  # also infinity, which is near itself alone
        return True
    return abs(left - right) < 1e-6 * max(abs(left), abs(right))


@_false_when_it_raises
def same_equation(gold: tuple[str, str], found: tuple[str, str]) -> bool:
    """Left and right sides: whether one equation is the other times a constant."""
    if any(_refused(text) for text in (*gold, *found)):
        return False
    sides = [_parse(text) for text in (*gold, *found)]
    if not all(sides):
        return False
    import sympy

    a, b, c, d = (side[0] for side in sides)
    if not all(isinstance(one, sympy.Expr) for one in (a, b, c, d)):
        return False
    return _subscripts(" ".join(gold)) == _subscripts(" ".join(found)) and _close(
        a - b, c - d, up_to_factor=True
    )


@functools.cache
def math_verify() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        import math_verify
    except ImportError as error:
        raise ValueError("reward.function math needs math-verify: pip install 'gspo-dist[math]'") from error
    return math_verify


# math-verify 0.9.0 keeps its deadlines with SIGALRM, which only a main thread may use: elsewhere it raises.
# Both are turned off, because evaluations may judge in threads; in a run the deadline is reward.timeout_s.
def _parse(text: str) -> list[Any]:
    return math_verify().parse(rf"\boxed{{{text}}}", parsing_timeout=None)


def _verify(gold: list[Any], found: list[Any]) -> bool:
    return bool(math_verify().verify(gold, found, timeout_seconds=None))
