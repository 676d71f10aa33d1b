"""Keys that a user passes on to a library's own configuration, checked without importing the library.

Megatron-core and DeepSpeed take seconds to import and change the process that they are in, and a misspelt key
must be told before anything starts. So their configuration classes are read as text, out of the installed
source: names, aliases and types are always those of the version that will run. Where the library is not
installed (a laptop that plans), only gspo_dist's own keys are known, and those are refused all the same.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16", "float16", "uint8")
"""Those of torch that a configuration may name. The last is how megatron-core says fp8."""


class Declared(NamedTuple):
    """A class of a library, by where its source lies below the library's folder."""

    package: str
    """Top-level name, which can be looked up without importing anything."""
    file: str
    """Path below the package's folder."""
    name: str
    """Of the class."""


@functools.cache
def source_of(package: str, file: str) -> ast.Module | None:
    """The parsed source of an installed file. None where the package or the file is not there."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / file
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def fields_of(classes: Iterable[Declared]) -> dict[str, str] | None:
    """Every public field of these classes with its type as text; None where the library is not installed.

    A field that pydantic knows by an alias too is listed under both names.
    """
    found: dict[str, str] = {}
    for wanted in classes:
        module = source_of(wanted.package, wanted.file)
        if module is None:
            return None
        for line in _body(module, wanted.name):
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            if not line.target.id.startswith("_"):
                names = (line.target.id, *_aliases(line.value))
                found |= dict.fromkeys(names, ast.unparse(line.annotation))
    return found


def _body(module: ast.Module, name: str) -> list[ast.stmt]:
    return next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name).body


def _aliases(value: ast.expr | None) -> list[str]:
    if not isinstance(value, ast.Call):
        return []
    return [ast.literal_eval(word.value) for word in value.keywords if word.arg == "alias"]


def members_of(enum: Declared) -> list[str]:
    """The members of an Enum of the installed library."""
    module = source_of(enum.package, enum.file)
    lines = _body(module, enum.name) if module else []
    return [t.id for n in lines if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def own_keys(table: Mapping[str, str]) -> dict[str, str]:
    """key -> why it is not the user's, from a table of reasons, each with its keys in one text."""
    return {key: reason for reason, keys in table.items() for key in keys.split()}


def check_names(
    section: str, given: Mapping[str, Any], known: Iterable[str] | None, own: Mapping[str, str], what: str
) -> None:
    """Raises ValueError for a key that gspo_dist sets itself, or that the library does not know.

    section: the knob under which the keys stand. known: None where the library is not installed.
    own: key -> the way out. what: takes the keys, in words.
    """
    for key, value in given.items():
        if key in own:
            raise ValueError(
                f"{section} must leave alone what gspo_dist sets itself: got {key}={value!r}; {own[key]}"
            )
        if known is not None and key not in known:
            close = difflib.get_close_matches(str(key), [k for k in known if k not in own], n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else "; see the fields in its source"
            raise ValueError(f"{section} must hold names that {what} has: got {key!r}{hint}")


def check_values(
    section: str, given: Mapping[str, Any], kinds: Mapping[str, str], enums: Mapping[str, list[str]]
) -> None:
    """Raises ValueError for a value of another type than the field's.

    kinds: field -> its type as the library writes it. enums: the members of each Enum, which are given by
    name. A dtype is given by name too.
    """
    for key, value in given.items():
        if not fits(value, ast.parse(kinds[key], mode="eval").body, enums):
            options = "".join(f", by name: {', '.join(enums[n])}" for n in enums if n in kinds[key])
            options += f", by name: {', '.join(DTYPES)}" if "dtype" in kinds[key] else ""
            raise ValueError(f"{section}.{key} must be {kinds[key]}{options}: got {value!r}")


def fits(value: Any, kind: ast.expr, enums: Mapping[str, list[str]]) -> bool:
    """Whether a value out of a configuration is of a type. What no configuration can hold never is."""
    if isinstance(kind, ast.Constant):  # None, and the texts of a Literal
        return bool(value == kind.value and type(value) is type(kind.value))
    if isinstance(kind, ast.Attribute):
        return kind.attr == "dtype" and value in DTYPES
    if isinstance(kind, ast.Name):
        if kind.id in enums:
            return value in enums[kind.id]
        if kind.id == "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        plain = {"bool": bool, "int": int, "str": str, "list": list}.get(kind.id)
        return plain is not None and isinstance(value, plain) and isinstance(value, bool) == (plain is bool)
    if not isinstance(kind, ast.Subscript) or not isinstance(kind.value, ast.Name):
        return False
    parts = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    if kind.value.id == "Optional" and value is None:
        return True
    if kind.value.id in ("Optional", "Union", "Literal"):
        return any(fits(value, part, enums) for part in parts)
    if kind.value.id in ("List", "list"):
        return isinstance(value, (list, tuple)) and all(fits(v, parts[0], enums) for v in value)
    return False
