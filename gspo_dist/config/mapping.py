"""Dataclasses from plain mappings and back: what a config file, a resolved config and a checkpoint hold."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gspo_dist.checks import nearest

T = TypeVar("T")

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A (nested) config dataclass built from plain mappings.

    `where` is the dotted prefix that messages put before a key. Raises ValueError for an unknown key (with
    the nearest known one), for a value of another type, and for what the dataclasses' own checks refuse.
    """
    hints = typing.get_type_hints(cls)
    known = _fields(cls)
    for key in values:
        if key not in known:
            raise ValueError(f"unknown config key {where + key!r}: {nearest(key, known)}")
    built: dict[str, Any] = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            built[key] = from_mapping(typing.cast(type, kind), value, f"{where}{key}.")
        else:
            built[key] = _coerce(kind, value, where + key)
    return cls(**built)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a run folder's config.json.

    Raises ValueError with the file and the way out when it is torn or holds something else.
    """
    try:
        # utf-8 by name, because the locale of a batch job may be another
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        problem = f"it holds a {type(values).__name__}"
    except (OSError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"{path} must hold a run's configuration as a JSON object: {problem}; remove the file and repeat the "
        "run's own gspo train command, which writes it again"
    )


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain mapping that `from_mapping` reads back: what resolved configs and checkpoints store."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a plain mapping; a list is a leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def knobs(cls: type, prefix: str = "") -> dict[str, Any]:
    """The dotted name of every section and knob below a config dataclass, with its type.

    Example: knobs(RunConfig) holds "learner", "learner.optimizer", "learner.optimizer.lr", ...
    """
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for key in _fields(cls):
        found[prefix + key] = hints[key]
        if dataclasses.is_dataclass(hints[key]):
            found |= knobs(typing.cast(type, hints[key]), f"{prefix}{key}.")
    return found


def described(kind: Any) -> str:
    """A knob's type as a message says it: "a whole number" for int and for int | None."""
    kind = _without_none(kind)
    kind = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind):
        return "a section, whose knobs are set one by one"
    return "a list" if kind is tuple else KINDS.get(kind, getattr(kind, "__name__", str(kind)))


def _fields(cls: type) -> list[str]:
    # dataclasses.fields is typed for dataclasses only, and a TypeVar cannot say "some dataclass".
    return [f.name for f in dataclasses.fields(typing.cast(Any, cls))]


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`: an int stands for a float, a list for a tuple. The rest is refused by name."""
    if value is None and _without_none(kind) is not kind:
        return None
    kind = _without_none(kind)
    expected = typing.get_origin(kind) or kind
    if expected is Any:
        return value
    if expected is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, and `steps: true` is a mistake
    if (expected is int and isinstance(value, bool)) or not isinstance(value, expected):
        raise ValueError(f"{where} must be {described(kind)}: got {value!r}")
    return value


def _without_none(kind: Any) -> Any:
    """The first type of a union that is not None. Any other type as it is."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    return next(a for a in typing.get_args(kind) if a is not type(None))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
