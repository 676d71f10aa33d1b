"""What is wrong with an override, in gspo's words: the override, the rule, and how to write it instead."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from gspo_dist.checks import nearest
from gspo_dist.cli.compose import conf_dir
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import described, knobs

# What hydra's grammar gives a meaning of its own, or none.
SPECIAL = "=,'\"#&~()[]{}$"


def check_overrides(overrides: Sequence[str], *, sweep: bool = False) -> None:
    """Raises ValueError for the first override that hydra cannot read, or whose key no run has.

    sweep: several values for one key are meant (`--multirun`).
    """
    parser = OverridesParser.create()
    # Once for all: a quickstart's worth of overrides would read the file as often.
    known, groups = knobs(RunConfig), config_groups()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals and not key.startswith("~"):
            raise ValueError(f"overrides have the form key=value: got {text!r}")
        if not key.strip("+~"):
            raise ValueError(f"overrides have the form key=value: got no key in {text!r}")
        try:
            parsed = parser.parse_override(text)
        except HydraException:
            raise ValueError(_unreadable(text, key, value)) from None
        if not sweep and parsed.is_sweep_override():
            raise ValueError(
                f"the override {text!r} names several values: write {quoted(key, value)} if it is one text, "
                f"{key}=[{value}] if it is a list, or add --multirun for a run of each"
            )
        _check_key(parsed, text, known, groups)


def _unreadable(text: str, key: str, value: str) -> str:
    said = f"hydra cannot read the override {text!r}: "
    if value[:1] in ("[", "{"):
        return (
            f"{said}a list has the form [a,b] and a mapping {{key: value}}; "
            "a text in them with special characters needs double quotes"
        )
    special = " ".join(c for c in SPECIAL if c in value)
    return f"{said}a value with {special or 'special characters'} needs quotes; write {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    """The override that gives `key` the text `value`, as a shell takes it.

    Example: quoted("data.train", "/a=b.jsonl") is 'data.train="/a=b.jsonl"', single quotes included.
    """
    # Between double quotes hydra reads everything as it is, except backslashes before a quote or the end.
    text = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + (r"\"" if found[2] else ""), value)
    return shlex.quote(f'{key}="{text}"')


def _check_key(override: Override, text: str, known: Mapping[str, Any], groups: Sequence[str]) -> None:
    key = override.key_or_group
    if key == "hydra" or key.startswith("hydra.") or key.startswith("hydra/") or override.package is not None:
        return
    if key in known or key in groups:
        return
    section = next((k for k in known if key.startswith(f"{k}.") and described(known[k]) == "a mapping"), None)
    if section is not None:  # the keys of a mapping are the user's own
        return
    if key in ("study", "arm") or key.startswith("study."):
        raise ValueError(f"{key} belongs to `gspo compare`: got {text!r}; run gspo compare study=NAME")
    raise ValueError(f"unknown config key {key!r}. {_closest(key, [*known, *groups])}")


def _closest(key: str, known: Sequence[str]) -> str:
    """The nearest name, of the same section where that is known. All two hundred are no help in a message."""
    section, dot, rest = key.partition(".")
    prefix = section + dot if dot and section in known else ""
    # Without the section's name, which would make everything in it look alike.
    names = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    close = difflib.get_close_matches(rest if prefix else key, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    if prefix:
        return f"{section} has {', '.join(name for name in names if '.' not in name)}"
    return "gspo train --cfg job prints the known ones"


def config_groups() -> list[str]:
    """The groups that a run's configuration is composed from: those that conf/config.yaml lists."""
    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    return [name for entry in defaults if isinstance(entry, Mapping) for name in entry if " " not in name]


def group_options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """What may stand after `group=`: the group's files in conf/ and in `folders`, without their ending."""
    groups = [folder / group for folder in (conf_dir(), *folders)]
    return sorted(str(p.relative_to(g).with_suffix("")) for g in groups for p in g.rglob("*.yaml"))


def explain(error: Exception, overrides: Sequence[str], folders: Sequence[Path] = ()) -> str:
    """A failed composition as one message: the file or override, the rule, what was got, the way out.

    `error` is what hydra, omegaconf or yaml raised. `folders` are those that were searched besides conf/.
    """
    text = str(error)
    if isinstance(error, yaml.YAMLError):
        return f"a configuration must be YAML: {' '.join(text.split())}"
    if isinstance(error, UnicodeDecodeError):
        return f"a configuration must be UTF-8: {_undecodable([conf_dir(), *folders]) or text}"
    found = re.match(r"In '([^']+)': ", text)
    # hydra names the file by its group and option; the root's name means that an override is at fault
    file = f"{found[1]}.yaml: " if found and found[1] != "config" else ""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).partition("/")
        if group in config_groups():
            options = group_options(group, folders)
            return f"{file}{group}={option} is none of its options: {nearest(option, options)}"
    own = isinstance(error, OmegaConfBaseException)  # not wrapped by hydra
    cause = error if own else error.__cause__ or error.__context__ or error
    key = str(getattr(cause, "full_key", "") or "")
    if isinstance(cause, ValidationError) and key in knobs(RunConfig):
        return f"{file}{key} must be {described(knobs(RunConfig)[key])}: got {_given(key, overrides, cause)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and file and key in config_groups():
        return f"{file}the first line of an experiment or a layout must be: # @package _global_"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and file:
        return f"{file}unknown config key {key!r}. {_closest(key, list(knobs(RunConfig)))}"
    unmatched = re.search(r"Could not override '([^']+)'. No match in the defaults list", text)
    if unmatched:
        return f"{file}a run has no group {unmatched[1]!r}; {nearest(unmatched[1], config_groups())}"
    return " ".join(_lines(error, cause, key))


def _given(key: str, overrides: Sequence[str], cause: Exception) -> str:
    """The value at fault: the override's text, or what omegaconf's message quotes of a file."""
    override = next((o for o in overrides if o.lstrip("+").partition("=")[0] == key), None)
    if override is not None:
        return repr(override.partition("=")[2])
    quoted_value = re.match(r"Value ('.*?') of type", str(cause))
    return quoted_value[1] if quoted_value else str(cause).splitlines()[0]


def _undecodable(folders: Sequence[Path]) -> str | None:
    """The first file of these folders that is no UTF-8. The error itself does not name its file."""
    for path in (p for folder in folders for p in sorted(folder.rglob("*.yaml"))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            return f"{path} ({error})"
    return None


def _lines(error: Exception, cause: BaseException, key: str) -> Iterator[str]:
    """hydra's message with its way out, then the first line of what caused it."""
    # omegaconf adds lines about classes that no user knows
    lines = str(error).splitlines()[: 1 if isinstance(error, OmegaConfBaseException) else None]
    if isinstance(error, OmegaConfBaseException) and key:
        yield f"{key}:"
    yield from (line.strip() for line in lines if not line.startswith("See http"))
    if cause is not error:
        yield f"({str(cause).splitlines()[0]})"
