"""Finding what a configuration names by `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from gspo_dist.checks import nearest


def load(knob: str, name: str, target: str) -> Any:
    """The object behind `target`, which is `module:attribute` or `file.py:attribute`.

    knob and name: the setting and its value, for messages. Raises ValueError when it cannot be found.
    """
    place, _, attribute = target.rpartition(":")
    module = _module_of_file(knob, name, place) if place.endswith(".py") else _module(knob, name, place)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_") and callable(getattr(value, n))]
            raise ValueError(f"{knob} {name!r}: {place} has no {attribute!r}; {nearest(attribute, public)}")
        value = getattr(value, part)
    return value


def absolute(target: str) -> str:
    """`target` with the path of a file made absolute: a run's processes may work in other folders."""
    place, _, attribute = target.rpartition(":")
    if not place.endswith(".py"):
        return target
    return f"{Path(place).expanduser().resolve()}:{attribute}"


def _module(knob: str, name: str, place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise ValueError(
            f"{knob} {name!r}: cannot import {place}: {error}; is it on PYTHONPATH of every "
            "process? A file can be given as path/to/file.py:name"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{knob} {name!r}: {place} raised {type(error).__name__}: {error}") from error


def _module_of_file(knob: str, name: str, place: str) -> Any:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{knob} {name!r}: no such file: {file}")
    # A name of its own for every path: two files called reward.py must not answer for one another.
    module_name = f"gspo_dist_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"{knob} {name!r}: {file} raised {type(error).__name__}: {error}") from error
    return module
