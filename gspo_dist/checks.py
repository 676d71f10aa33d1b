"""What checks of user input share: bounds, choices, the nearest known name, divisors to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, options: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the closest known one, then all of them."""
    known = list(options)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else '(none)'}"


def choose(field: str, name: object, options: Iterable[str]) -> str:
    """`name` if it is one of `options`. Otherwise ValueError that names `field`."""
    known = list(options)
    if not isinstance(name, str) or name not in known:
        hint = nearest(name, known)
        if str(name) == "False" and "off" in known:
            hint = f'YAML reads a bare off as false, so write "off" with its quotes; {hint}'
        raise ValueError(f"{field} must be a known name: got {name!r}; {hint}")
    return name


def true_or_false(field: str, value: object) -> None:
    """ValueError that names `field` unless `value` is a bool: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{field} must be true or false: got {value!r}")


def divisors(total: int, most: int = 8) -> str:
    """The divisors of `total` as an error message lists them: "1, 2, 3, 6, 12" for 12.

    Only the `most` smallest are listed, because a message with all 24 divisors of 360 helps nobody.
    """
    found = [d for d in range(1, total + 1) if total % d == 0]
    return ", ".join(str(d) for d in found[:most]) + (", ..." if len(found) > most else "")


def at_least(field: str, value: float | None, low: float) -> None:
    """ValueError that names `field` unless `value` is `low` or more. Null passes."""
    if value is not None and not value >= low:
        raise ValueError(f"{field} must be at least {low}: got {value}")


def above(field: str, value: float | None, low: float) -> None:
    """ValueError that names `field` unless `value` is more than `low`. Null passes."""
    if value is not None and not value > low:
        raise ValueError(f"{field} must be above {low}: got {value}")
