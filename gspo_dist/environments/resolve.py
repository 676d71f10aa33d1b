"""From a configuration to what makes the environment of one episode."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gspo_dist.checks import nearest
from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.adapters import OpenEnvEpisode, adapted
from gspo_dist.environments.protocol import Environment, facts
from gspo_dist.environments.tools import Tool, ToolEnvironment, tool_of
from gspo_dist.loading import absolute, load

BUILT_IN = {
    "calculator": "gspo_dist.environments.calculator:Calculator",
    "guess": "gspo_dist.environments.guess:Guess",
    "python": "gspo_dist.environments.python:Python",
}
"""Factories by their short names."""
BUILT_IN_TOOLS = {
    "calculate": "gspo_dist.environments.calculator:calculate",
    "python": "gspo_dist.environments.python:python",
}
"""Tools by their short names."""
MCP, OPENENV = "mcp:", "openenv:"


@dataclass(frozen=True)
class Maker:
    """What makes episodes, and what is to be known of them."""

    make: Callable[[], Environment]
    facts: dict[str, Any]


def resolve(config: EnvironmentConfig, form: str = "hermes") -> Maker:
    """form: how the model writes calls of tools (tools.FORMATS).

    Raises ValueError when something cannot be found, takes other options, or has no verbs that are known.
    An MCP server is started here and stays up with the process.
    """
    if config.factory is None:
        tools = [tool for name in config.tools for tool in _tools(name)]
        names = [tool.name for tool in tools]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"environment.tools must have names of their own: {min(twice)!r} comes twice")
        return Maker(
            lambda: ToolEnvironment(tools, form),
            facts(f"tools: {', '.join(names)}", [dict(tool.schema) for tool in tools]),
        )
    name = config.factory
    if name.startswith(OPENENV):
        url = name.removeprefix(OPENENV)
        _check_options(name, OpenEnvEpisode, ("url",), config.options)
        return Maker(lambda: OpenEnvEpisode(url, **config.options), facts(f"OpenEnv at {url}"))
    if ":" not in name and name not in BUILT_IN:
        raise ValueError(
            "environment.factory must be a built-in name, package.module:name, path/to/file.py:name or "
            f"openenv:URL: got {name!r}; {nearest(name, BUILT_IN)}"
        )
    factory = load("environment.factory", name, BUILT_IN.get(name, name))
    _check_options(name, factory, (), config.options)
    try:
        first = factory(**config.options)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"environment.factory {name!r} raised {type(error).__name__}: {error}") from error
    adapted(first)  # what it makes has verbs that are known
    if callable(getattr(first, "close", None)):
        first.close()
    schemas = list(getattr(factory, "tools", ()))
    return Maker(lambda: adapted(factory(**config.options)), facts(name, schemas))


def _check_options(name: str, factory: Any, fixed: tuple[str, ...], options: dict[str, Any]) -> None:
    if not callable(factory):
        raise ValueError(f"environment.factory {name!r} must be a class or a function: got {factory!r}")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in types have none
        return
    try:
        signature.bind(*fixed, **options)
    except TypeError as error:
        raise ValueError(
            f"environment.options: {name} takes {signature}: got {sorted(options)} ({error})"
        ) from error


def _tools(name: str) -> list[Tool]:
    if name.startswith(MCP):
        from gspo_dist.environments.mcp import mcp_tools

        return mcp_tools(name.removeprefix(MCP))
    if ":" not in name and name not in BUILT_IN_TOOLS:
        raise ValueError(
            "environment.tools must hold built-in names, package.module:name, path/to/file.py:name or "
            f"mcp:COMMAND: got {name!r}; {nearest(name, BUILT_IN_TOOLS)}"
        )
    function = load("environment.tools", name, BUILT_IN_TOOLS.get(name, name))
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"environment.tools: {name} must be a function: got {function!r}")
    check = getattr(function, "check", None)
    if callable(check):  # what would fail in every call is told before the run, and not to the policy
        check()
    return [tool_of(function)]


def located(config: EnvironmentConfig) -> EnvironmentConfig:
    """`config` with the paths of files made absolute: its processes may work in other folders."""
    files = tuple(name if name.startswith(MCP) else absolute(name) for name in config.tools)
    factory = config.factory
    if factory is not None and not factory.startswith(OPENENV):
        factory = absolute(factory)
    return replace(config, factory=factory, tools=files)
