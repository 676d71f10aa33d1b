"""The reward protocol, the table of built-in rewards, and the checks around a call."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gspo_dist.checks import nearest
from gspo_dist.config import RewardConfig
from gspo_dist.types import Completion, Prompt


class Reward(Protocol):
    """Judges one completion: the reward alone, or the reward with its named parts (logged, not trained on).

    A function of (prompt, completion) with its options as keywords; it must depend on nothing else, so that
    reward processes can run it in any order, and a resumed run gives the same rewards.
    """

    def __call__(
        self, prompt: Prompt, completion: Completion
    ) -> float | tuple[float, Mapping[str, float]]: ...


class Judged(NamedTuple):
    """A checked verdict."""

    reward: float
    parts: dict[str, float]


Item = tuple[int, Prompt, Completion]
"""What a reward pool judges: the rollout's id (-1 for a held-out completion), its prompt, its completion."""


class RewardError(RuntimeError):
    """A reward function failed or gave no finite number; the message names the rollout."""


class BuiltIn(NamedTuple):
    """Where a built-in reward lives, as module:name; the modules are imported when they are asked for."""

    function: str
    check_options: str
    """(**options): raises ValueError for values that the function could not work with."""
    check_answer: str
    """(answer): raises ValueError for a prompt's answer that the function could not read."""


BUILT_IN = {
    "exact_match": BuiltIn(
        "gspo_dist.rewards.exact:exact_match",
        "gspo_dist.rewards.exact:check_options",
        "gspo_dist.rewards.answers:check_answer",
    ),
    "math": BuiltIn(
        "gspo_dist.rewards.math:math",
        "gspo_dist.rewards.math:check_options",
        "gspo_dist.rewards.math:check_answer",
    ),
}


def resolve_reward(config: RewardConfig) -> Reward:
    """The function that `config` names, with its options bound.

    Names: a built-in; `package.module:name`; `path/to/file.py:name` (relative to the working
    directory). Raises ValueError when it cannot be found, is no plain function of (prompt, completion),
    or refuses the options.
    """
    name = config.function
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        bound = _bind(name, _load(name, built_in.function), config.options)
        _load(name, built_in.check_options)(**config.options)
        return bound
    if ":" not in name:
        raise ValueError(
            "reward.function must be a built-in name, package.module:name or path/to/file.py:name: got "
            f"{name!r}; " + nearest(name, BUILT_IN)
        )
    return _bind(name, _load(name, name), config.options)


def answer_check(config: RewardConfig) -> Callable[[Any], None]:
    """The check of one prompt's answer: it raises ValueError for an answer that the reward cannot read.

    A reward of one's own has a check when its function has an attribute of that name (`f.check_answer = g`).
    Without one every answer passes. Raises ValueError itself where `resolve_reward` does.
    """
    name = config.function
    if name in BUILT_IN:
        return _load(name, BUILT_IN[name].check_answer)
    resolve_reward(config)
    return getattr(_load(name, name), "check_answer", lambda answer: None)


def check_answers(config: RewardConfig, prompts: Iterable[Prompt]) -> None:
    """Raises ValueError, naming file and line, for a prompt whose answer the reward cannot read."""
    check = answer_check(config)
    for prompt in prompts:
        try:
            check(prompt.answer)
        except ValueError as error:
            raise ValueError(
                f"{prompt.prompt_id}: reward.function {config.function} cannot read the answer: {error}"
            ) from error


def located(config: RewardConfig) -> RewardConfig:
    """`config` with the path of a reward file made absolute: its processes may work in other folders."""
    place, _, attribute = config.function.rpartition(":")
    if not place.endswith(".py"):
        return config
    return replace(config, function=f"{Path(place).expanduser().resolve()}:{attribute}")


def judge_rollout(fn: Reward, prompt: Prompt, completion: Completion, rollout_id: int) -> Judged:
    """Calls `fn` and checks what it gives.

    Raises RewardError, from the cause, naming the rollout and its prompt.
    """
    who = describe(rollout_id, prompt)
    try:
        verdict = fn(prompt, completion)
    except SystemExit as error:
        raise RewardError(f"{who} called exit({error.code!r}): return a number instead") from error
    except Exception as error:
        raise RewardError(f"{who} raised {type(error).__name__}: {error}") from error
    return checked(verdict, who)


def describe(rollout_id: int, prompt: Prompt) -> str:
    """A rollout's reward in messages."""
    rollout = f"rollout {rollout_id}" if rollout_id >= 0 else "a held-out completion"
    return f"reward of {rollout} (prompt {prompt.prompt_id})"


def checked(verdict: Any, who: str) -> Judged:
    """`verdict` as a Judged.

    Raises RewardError unless it is a finite number, alone or with a mapping of them.
    """
    reward, parts = verdict if isinstance(verdict, tuple) and len(verdict) == 2 else (verdict, {})
    if not isinstance(parts, Mapping):
        raise RewardError(f"{who}: its parts must be a mapping of names to numbers: got {parts!r}")
    return Judged(_finite(reward, who), {str(k): _finite(v, f"{who}, part {k!r}") for k, v in parts.items()})


def _finite(value: Any, who: str) -> float:
    try:
        number = float(value) if not isinstance(value, (str, bytes)) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"{who} must be a finite number: got {value!r}")
    return number


def _load(name: str, target: str) -> Callable[..., Any]:
    """The object behind `module:attribute` or `file.py:attribute`."""
    place, _, attribute = target.rpartition(":")
    module = _module_of_file(name, place) if place.endswith(".py") else _module(name, place)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_") and callable(getattr(value, n))]
            raise ValueError(
                f"reward.function {name!r}: {place} has no {attribute!r}; {nearest(attribute, public)}"
            )
        value = getattr(value, part)
    return value


def _module(name: str, place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise ValueError(
            f"reward.function {name!r}: cannot import {place}: {error}; is it on PYTHONPATH of every "
            "process? A file can be given as path/to/file.py:name"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward.function {name!r}: {place} raised {type(error).__name__}: {error}"
        ) from error


def _module_of_file(name: str, place: str) -> Any:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"reward.function {name!r}: no such file: {file}")
    # A name of its own for every path: two files called reward.py must not answer for one another.
    module_name = f"gspo_dist_user_reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
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
        raise ValueError(
            f"reward.function {name!r}: {file} raised {type(error).__name__}: {error}"
        ) from error
    return module


def _bind(name: str, fn: Any, options: Mapping[str, Any]) -> Reward:
    """`fn` with its options, after checking that it can be called with a prompt, a completion
    and those options.
    """
    rule = f"reward.function {name!r} must be a function (prompt, completion, *, options)"
    if not callable(fn) or inspect.isclass(fn):
        raise ValueError(f"{rule}: got {'the class ' + fn.__name__ if inspect.isclass(fn) else repr(fn)}")
    if inspect.iscoroutinefunction(fn):
        raise ValueError(
            f"{rule}: got an async function; make it a plain one (reward processes already overlap)"
        )
    signature = inspect.signature(fn)
    parameters = list(signature.parameters.values())
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = [p.name for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for option in options:
        if option not in accepted and not takes_any:
            raise ValueError(f"reward.options: {name} has no option {option!r}; {nearest(option, accepted)}")
    try:
        signature.bind(None, None, **options)
    except TypeError as error:
        raise ValueError(
            f"{rule}: its signature is {signature} and the options {sorted(options)}: {error}"
        ) from error
    return functools.partial(fn, **options) if options else fn
