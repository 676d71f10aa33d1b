"""Rewards made of others: a weighted sum, and another reward for each source of the data.

reward=function reward.function=weighted_sum
options: {terms: {right: {function: math}, shape: {function: format, weight: 0.1},
                  long: {function: overlong, options: {max_tokens: 2048, cache: 512}}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from gspo_dist.checks import nearest, true_or_false
from gspo_dist.config import RewardConfig
from gspo_dist.rewards.calls import Reward, as_one
from gspo_dist.types import Completion, Prompt

Terms = Mapping[str, Mapping[str, Any]]


def weighted_sum(prompt: Prompt, completion: Completion, *, terms: Terms) -> tuple[float, dict[str, float]]:
    """The sum of weight times reward over the terms; the rewards of gates multiply it.

    terms: name -> {function, options, weight (1), gate (false)}. Parts: every term's own reward under its
    name, before the weight, and its parts as name/part. A gate that gives 0 spares the terms after it: they
    are not computed, and have no parts.
    """
    total, factor, parts = 0.0, 1.0, {}
    for name, term in sorted(terms.items(), key=lambda one: not _is_gate(one[1])):
        if factor == 0.0:
            break
        reward, inner = part_of(_function(term), prompt, completion)
        parts[name] = reward
        parts.update({f"{name}/{key}": value for key, value in inner.items()})
        if _is_gate(term):
            factor *= reward
        else:
            total += _weight(term) * reward
    return total * factor, parts


def by_source(
    prompt: Prompt, completion: Completion, *, sources: Terms, field: str = "data_source"
) -> tuple[float, dict[str, float]]:
    """The reward that the record's source asks for.

    sources: pattern (as in file names: "openai/*") -> {function, options}. The first that fits is taken, and
    "*" fits the rest. field: the record's column. Parts: those of the reward. Under the pattern also `share`
    (1) and `reward`, whose means are the share of the source and its part of the reward.
    """
    pattern = pattern_for(prompt, sources, field)
    reward, inner = part_of(_function(sources[pattern]), prompt, completion)
    return reward, {**inner, f"{pattern}/share": 1.0, f"{pattern}/reward": reward}


def pattern_for(prompt: Prompt, sources: Terms, field: str) -> str:
    """Raises ValueError when no pattern fits."""
    source = str(prompt.metadata.get(field, ""))
    for pattern in sources:
        if fnmatchcase(source, pattern):
            return pattern
    raise ValueError(
        f"reward.options.sources must have a pattern for every record's {field}: got {source!r}; "
        + nearest(source, sources)
        + '; "*" fits the rest'
    )


def part_of(function: Reward, prompt: Prompt, completion: Completion) -> tuple[float, Mapping[str, float]]:
    verdict = function(prompt, completion)
    return verdict if isinstance(verdict, tuple) else (float(verdict), {})


def config_of(term: Mapping[str, Any]) -> RewardConfig:
    return RewardConfig(function=term["function"], options=dict(term.get("options") or {}))


def _is_gate(term: Mapping[str, Any]) -> Any:
    return term.get("gate", False)


def _weight(term: Mapping[str, Any]) -> Any:
    return term.get("weight", 1.0)


_RESOLVED: dict[str, Reward] = {}
"""The rewards of terms, by what the terms say: they are looked up for every completion."""


def _function(term: Mapping[str, Any]) -> Reward:
    from gspo_dist.rewards.reward import resolve_reward

    config = config_of(term)
    key = repr(config)
    if key not in _RESOLVED:
        _RESOLVED[key] = as_one(resolve_reward(config))
    return _RESOLVED[key]


def check_terms(terms: Any, known: tuple[str, ...], name: str) -> None:
    """Raises ValueError for terms that name no reward, or that a reward refuses."""
    from gspo_dist.rewards.reward import resolve_reward

    field = f"reward.options.{name}"
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"{field} must be a mapping of names to {{{', '.join(known)}}}: got {terms!r}")
    for key, term in terms.items():
        if not isinstance(term, Mapping) or "function" not in term:
            raise ValueError(f"{field}.{key} must have a function: got {term!r}")
        for option in term:
            if option not in known:
                raise ValueError(f"{field}.{key} has no key {option!r}; {nearest(option, known)}")
        try:
            resolve_reward(config_of(term))
        except ValueError as error:
            raise ValueError(f"{field}.{key}: {error}") from error


def check_weighted_sum(*, terms: Any) -> None:
    check_terms(terms, ("function", "options", "weight", "gate"), "terms")
    for key, term in terms.items():
        weight = _weight(term)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"reward.options.terms.{key}.weight must be a number: got {weight!r}")
        true_or_false(f"reward.options.terms.{key}.gate", _is_gate(term))
    if all(_is_gate(term) for term in terms.values()):
        raise ValueError("reward.options.terms must have a term that is no gate")


def check_by_source(*, sources: Any, field: str) -> None:
    check_terms(sources, ("function", "options"), "sources")
    if not isinstance(field, str) or not field:
        raise ValueError(f"reward.options.field must be the name of a column: got {field!r}")


def check_weighted_sum_prompt(prompt: Prompt, *, terms: Terms) -> None:
    """Raises ValueError for a record that one of the terms cannot read."""
    from gspo_dist.rewards.reward import prompt_check

    for term in terms.values():
        prompt_check(config_of(term))(prompt)


def check_by_source_prompt(prompt: Prompt, *, sources: Terms, field: str) -> None:
    """Raises ValueError for a record without a reward, or that its reward cannot read."""
    from gspo_dist.rewards.reward import prompt_check

    prompt_check(config_of(sources[pattern_for(prompt, sources, field)]))(prompt)
