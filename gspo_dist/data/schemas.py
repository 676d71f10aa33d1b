r"""Question and answer of a row, in the schemas that users already have.

    form             question                       answer
    plain            problem, question, ...         answer, expected_answer, ...
    verl             prompt, as messages            reward_model.ground_truth
    TRL              prompt, a text or messages     solution, or another of the list below
    OpenAI           messages, with tools           their last one, of the assistant, where no column is one
    Open-Reasoner    prompt, as [{from, value}]     final_answer

Columns that the configuration names come first. Only where a row lacks the default ones (prompt, answer), the
names below are tried, in their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

QUESTIONS = ("messages", "problem", "question", "instruction", "query", "input")
ANSWERS = (
    "reward_model.ground_truth",
    "ground_truth",
    "expected_answer",
    "final_answer",
    "solution",
    "target",
    "label",
)
DEFAULT_QUESTION, DEFAULT_ANSWER = "prompt", "answer"
ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in [{from, value}] that are not those of chat templates."""


def lookup(row: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """(whether there is a field `key`, its value). A dot reaches into nested objects."""
    if key in row:
        return True, row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def question_key(row: Mapping[str, Any], wanted: str) -> str | None:
    """The field that holds the question. None where there is none."""
    names = (wanted, *QUESTIONS) if wanted == DEFAULT_QUESTION else (wanted,)
    return next((name for name in names if lookup(row, name)[0]), None)


def answer_key(row: Mapping[str, Any], wanted: str) -> str | None:
    """The field that holds the answer. None where there is none."""
    names = (wanted, *ANSWERS) if wanted == DEFAULT_ANSWER else (wanted,)
    found = [name for name in names if lookup(row, name)[0]]
    # A null column is passed over where another one is filled.
    return next((name for name in found if lookup(row, name)[1] is not None), found[0] if found else None)


def as_messages(value: Any) -> Any:
    """Messages from their JSON text and from [{from, value}]. Everything else as it is.

    Example: [{"from": "human", "value": "1+1?"}] gives [{"role": "user", "content": "1+1?"}].
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            decoded = json.loads(value)
        except json.JSONDecodeError:
            return value
        if isinstance(decoded, list) and all(isinstance(m, dict) and _role(m) for m in decoded):
            value = decoded
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        return value
    if all(isinstance(m.get("from"), str) and "value" in m for m in value):
        return [{"role": ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in value]
    return value


def _role(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("role", message.get("from")), str)


def split_conversation(value: Any) -> tuple[Any, Any]:
    """(the messages before the assistant's last one, its content), or (value, None) where it is no such."""
    if isinstance(value, list) and len(value) > 1 and isinstance(value[-1], Mapping):
        last = value[-1]
        if last.get("role") == "assistant" and isinstance(last.get("content"), str):
            return value[:-1], last["content"]
    return value, None


def answer_of(key: str, value: Any) -> Any:
    r"""The answer in a column. A worked solution with a box is its box: "so \boxed{42}." is "42"."""
    if key == "solution" and isinstance(value, str) and "boxed" in value:
        from gspo_dist.rewards.final_answer import final_answer

        return final_answer(value, boxed_only=True) or value
    return value
