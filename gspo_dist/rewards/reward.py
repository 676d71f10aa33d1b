"""The reward protocol, the table of built-in rewards, and the checks around a call."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gspo_dist.checks import nearest
from gspo_dist.config import RewardConfig
from gspo_dist.loading import absolute, load
from gspo_dist.rewards.calls import BATCHED, Reward, as_one, is_batched, verdicts
from gspo_dist.types import Completion, Prompt


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
    """(**options): raises ValueError for values that the function could not work with. It gets all options:
    the defaults stand at the function alone."""
    check_answer: str | None = None
    """(answer): raises ValueError for a prompt's answer that the function could not read."""
    check_prompt: str | None = None
    """(prompt, **options): the same where the answer alone does not tell."""


def _built_in(module: str, function: str, check: str, **checks: str) -> BuiltIn:
    places = {name: f"gspo_dist.rewards.{place}" for name, place in checks.items()}
    return BuiltIn(f"gspo_dist.rewards.{module}:{function}", f"gspo_dist.rewards.{module}:{check}", **places)


BUILT_IN = {
    "exact_match": _built_in("exact", "exact_match", "check_options", check_answer="answers:check_answer"),
    "math": _built_in("math", "math", "check_options", check_answer="math:check_answer"),
    "code": _built_in(
        "code", "code", "check_options", check_answer="code:check_answer", check_prompt="code:check_prompt"
    ),
    "regex": _built_in("terms", "regex", "check_regex"),
    "format": _built_in("terms", "format_tags", "check_format_tags"),
    "length": _built_in("terms", "length", "check_length"),
    "overlong": _built_in("terms", "overlong", "check_overlong"),
    "weighted_sum": _built_in(
        "combine", "weighted_sum", "check_weighted_sum", check_prompt="combine:check_weighted_sum_prompt"
    ),
    "by_source": _built_in(
        "combine", "by_source", "check_by_source", check_prompt="combine:check_by_source_prompt"
    ),
    "http": _built_in("remote", "http", "check_http"),
    "judge": _built_in("remote", "judge", "check_judge"),
}


def resolve_reward(config: RewardConfig) -> Reward:
    """The function that `config` names, with its options bound.

    Names: a built-in, `package.module:name`, or `path/to/file.py:name` (relative to the working
    directory). Raises ValueError when it cannot be found, is no plain function of (prompt, completion),
    or refuses the options.
    """
    name = config.function
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        bound = _bind(name, _load(name, built_in.function), config.options)
        _load(name, built_in.check_options)(**_all_options(config))
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
        place = BUILT_IN[name].check_answer
        return _load(name, place) if place else lambda answer: None
    resolve_reward(config)
    return getattr(_load(name, name), "check_answer", lambda answer: None)


def prompt_check(config: RewardConfig) -> Callable[[Prompt], None]:
    """As `answer_check`, for the whole prompt: some rewards also read its metadata, or ask another reward."""
    built_in = BUILT_IN.get(config.function)
    if built_in is not None and built_in.check_prompt:
        check = _load(config.function, built_in.check_prompt)
        wanted = inspect.signature(check).parameters
        options = {key: value for key, value in _all_options(config).items() if key in wanted}
        return functools.partial(check, **options)
    check_one = answer_check(config)
    return lambda prompt: check_one(prompt.answer)


def _all_options(config: RewardConfig) -> dict[str, Any]:
    """The options of a built-in reward, with its function's defaults for those that are not given."""
    parameters = inspect.signature(_load(config.function, BUILT_IN[config.function].function)).parameters
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    return {**defaults, **config.options}


def check_answers(config: RewardConfig, prompts: Iterable[Prompt]) -> None:
    """Raises ValueError, naming file and line, for a prompt whose answer the reward cannot read."""
    check = prompt_check(config)
    for prompt in prompts:
        check_one_answer(config, check, prompt)


def check_one_answer(config: RewardConfig, check: Callable[[Prompt], None], prompt: Prompt) -> None:
    """`check_answers` of one prompt, with the check that `prompt_check` gave."""
    try:
        check(prompt)
    except ValueError as error:
        raise ValueError(
            f"{prompt.prompt_id}: reward.function {config.function} cannot read the answer: {error}"
        ) from error


def readable_by(config: RewardConfig) -> Callable[[Prompt], None]:
    """Raises ValueError, naming file and line, for a prompt whose answer the reward cannot read."""
    return functools.partial(check_one_answer, config, prompt_check(config))


def located(config: RewardConfig) -> RewardConfig:
    """`config` with the path of a reward file made absolute: its processes may work in other folders."""
    return replace(config, function=absolute(config.function))


def judge_rollout(fn: Reward, prompt: Prompt, completion: Completion, rollout_id: int) -> Judged:
    """Calls `fn` and checks what it gives.

    Raises RewardError, from the cause, naming the rollout and its prompt.
    """
    (verdict,) = judge_rollouts(as_one(fn), [(rollout_id, prompt, completion)])
    if isinstance(verdict, RewardError):
        raise verdict
    return verdict


def judge_rollouts(fn: Reward, items: Sequence[Item]) -> Iterator[Judged | RewardError]:
    """The verdict on every item, in order, each as soon as it is there; a RewardError where there is none."""
    _, prompts, completions = zip(*items, strict=True)
    names = [describe(rollout_id, prompt) for rollout_id, prompt, _ in items]
    given = 0
    try:
        for verdict in verdicts(fn, prompts, completions):
            yield _judged(verdict, names[given])
            given += 1
    except (Exception, SystemExit) as error:  # of a batched function: nobody has a verdict
        for who in names[given:]:
            yield _failed(error, who)


def _judged(verdict: Any, who: str) -> Judged | RewardError:
    if isinstance(verdict, BaseException):
        return _failed(verdict, who)
    try:
        return checked(verdict, who)
    except RewardError as error:
        return error


def _failed(error: BaseException, who: str) -> RewardError:
    if isinstance(error, SystemExit):
        failed = RewardError(f"{who} called exit({error.code!r}): return a number instead")
    else:
        failed = RewardError(f"{who} raised {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


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


def _load(name: str, target: str) -> Any:
    """The object behind `module:attribute` or `file.py:attribute`."""
    return load("reward.function", name, target)


def _bind(name: str, fn: Any, options: Mapping[str, Any]) -> Reward:
    """`fn` with its options, after checking that it can be called with a prompt, a completion
    and those options.
    """
    rule = f"reward.function {name!r} must be a function (prompt, completion, *, options)"
    if callable(fn) and not inspect.isclass(fn) and is_batched(fn):
        rule = f"reward.function {name!r} must be a function ({', '.join(BATCHED)}, *, options)"
    if not callable(fn) or inspect.isclass(fn):
        raise ValueError(f"{rule}: got {'the class ' + fn.__name__ if inspect.isclass(fn) else repr(fn)}")
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
