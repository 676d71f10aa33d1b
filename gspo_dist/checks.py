"""Checks of user input that every room shares: the nearest known name, and a choice among known names."""

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
    """`name` if it is one of `options`; ValueError that names `field` otherwise."""
    known = list(options)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{field} must be a known name: got {name!r}; {nearest(name, known)}")
    return name
