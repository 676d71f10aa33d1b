"""Configurations from conf/ and overrides: hydra's schema, composing, running as a hydra application."""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_dist.cli.exits import fail
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import from_mapping

# Flags of a hydra application that take a value: the word after them is no override.
VALUE_FLAGS = (
    ("--cfg", "-c"),
    ("--package", "-p"),
    ("--config-name", "-cn"),
    ("--config-dir", "-cd"),
    ("--config-path", "-cp"),
    ("--info", "-i"),
)
HELP_FLAGS = ("-h", "--help", "--hydra-help", "-sc", "--shell-completion")


def conf_dir() -> Path:
    """The folder of config groups (in a checkout a link to the one at its root)."""
    return Path(__file__).parents[1] / "conf"


def open_schema(cls: type) -> type:
    """A config dataclass without the frozen flag.

    omegaconf makes nodes of frozen classes read-only, which would refuse every override. Field types and
    defaults stay, so hydra checks names and types.
    """
    hints = typing.get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(cls):
        kind, default = hints[f.name], dataclasses.field(default=f.default)
        if dataclasses.is_dataclass(kind):
            kind = open_schema(typing.cast(type, kind))
            default = dataclasses.field(default_factory=kind)
        elif f.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=f.default_factory)
        fields.append((f.name, kind, default))
    return dataclasses.make_dataclass(cls.__name__, fields)


@functools.cache
def register_schema() -> None:
    """Makes RunConfig's schema known to hydra as `run_schema`. A second call does nothing."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=open_schema(RunConfig))


def compose(overrides: Sequence[str], folders: Sequence[Path] = ()) -> dict[str, Any]:
    """The resolved configuration as a plain mapping.

    `folders` are more folders of config groups, searched after the package's own.
    Raises ValueError for an override that cannot be read, and for an unknown key, group or value.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from gspo_dist.cli.explain import check_overrides, explain

    check_overrides(overrides)
    for folder in folders:
        if not folder.expanduser().is_dir():  # hydra only warns
            raise ValueError(f"--config-dir must be a folder of configurations: got {folder}")
    register_schema()
    # hydra's --config-dir is a search path too, written as the override that it is.
    paths = ",".join(f'"file://{folder.expanduser().resolve()}"' for folder in folders)
    more = [f"hydra.searchpath=[{paths}]"] if folders else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return plain(OmegaConf.to_container(hydra_compose("config", [*overrides, *more]), resolve=True))
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(explain(error, overrides, folders)) from None


def plain(container: Any) -> dict[str, Any]:
    """What OmegaConf.to_container gives for the root of a configuration, with the type that it has."""
    return typing.cast(dict[str, Any], container)


def run_config(overrides: Sequence[str]) -> RunConfig:
    """A checked RunConfig from hydra overrides. Raises ValueError."""
    return from_mapping(RunConfig, compose(overrides))


def run_as_application(
    program: str, args: Sequence[str], task: Callable[[RunConfig], None], *, light: bool = False
) -> None:
    """Runs `task` as a hydra application: --cfg, --help, --info, multirun and completion are hydra's.

    Bad input ends with a message and status 2 before hydra starts, because hydra prints its own messages. So
    a configuration is composed twice, here and by hydra. The second time takes a tenth of a second.

    light: `task` only prints. Where no argument asks for anything of hydra but its composition, that is all
    that hydra does then: no log, no folder, and a third of a second less.
    """
    overrides, flags = split_arguments(args)
    if light and len(overrides) == len(args):
        try:
            config = run_config(overrides)
        except ValueError as error:
            fail(str(error), 2)
        task(config)
        return
    sweep = "-m" in args or "--multirun" in args
    if not any(flag in args for flag in HELP_FLAGS):
        _check_arguments(overrides, flags, sweep)
    import hydra
    from omegaconf import OmegaConf

    register_schema()

    def job(node: Any) -> None:
        try:
            config = from_mapping(RunConfig, plain(OmegaConf.to_container(node, resolve=True)))
        except ValueError as error:
            fail(str(error), 2)
        task(config)

    # hydra reads sys.argv itself, and shows its first word as the program's name
    sys.argv = [program, *args]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()


def split_arguments(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(words that are no flags, the value of each flag that takes one) of a hydra application's arguments.

    Example: ["steps=7", "--cfg", "job"] gives (["steps=7"], {"--cfg": "job"}).
    """
    long = {name: names[0] for names in VALUE_FLAGS for name in names}
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in long:
            flags[long[name]] = value if equals else next(rest, "")
        elif not word.startswith("-"):
            words.append(word)
    return words, flags


def _check_arguments(overrides: Sequence[str], flags: Mapping[str, str], sweep: bool) -> None:
    from gspo_dist.cli.explain import check_overrides

    try:
        if sweep:  # each job of a sweep composes for itself
            check_overrides(overrides, sweep=True)
        elif "--config-name" not in flags and "--config-path" not in flags:
            compose(overrides, [Path(flags["--config-dir"])] if "--config-dir" in flags else [])
    except ValueError as error:
        fail(str(error), 2)
