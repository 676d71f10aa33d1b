"""Dataclasses from plain mappings and back: what a config file, a resolved config and a checkpoint hold."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from gspo_dist.checks import nearest

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds a (nested) config dataclass from plain mappings; unknown keys are refused with the nearest known one."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown config key {where + key!r}: {nearest(key, known)}")
    built = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            value = from_mapping(kind, value, f"{where}{key}.")
        else:
            value = _coerce(kind, value, where + key)
        built[key] = value
    return cls(**built)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """Accepts what YAML gives for `kind` (an int for a float, a list for a tuple); refuses the rest by name."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple:
        return tuple(value)
    expected = origin or kind
    if expected is Any:
        return value
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if (expected is int and isinstance(value, bool)) or not isinstance(value, expected):
        raise ValueError(f"{where} must be {getattr(expected, '__name__', expected)}: got {value!r}")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain mapping that `from_mapping` reads back: what resolved configs and checkpoints store."""
    out = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], _plain(out))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
