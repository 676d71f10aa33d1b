"""From a question to the very tokens the engine receives."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gspo_dist.data.records import Message, Record

log = logging.getLogger(__name__)

Tokenizer = Any
"""An HF tokenizer."""


def render(
    record: Record,
    tokenizer: Tokenizer,
    *,
    chat_template: bool,
    system_prompt: str | None,
    template_args: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    cue: bool = True,
) -> tuple[str, tuple[int, ...]]:
    """(text, token ids) of a question.

    A list of messages is rendered by the tokenizer's template, and so is a text where `chat_template` holds
    and the tokenizer has a template. Messages reach the template as they are, the record's `tools` and
    `template_args` beside them. The text ends with the cue for the assistant's turn. A last message of the
    assistant is a prefill: the text ends with it, open, and the completion goes on from there. Any other
    text is tokenized as it stands, with the special tokens that the tokenizer adds to a text, but for the end
    of the sequence: the completion goes on from the text.

    tools: schemas for a template, where the record brings none of its own. cue: False leaves the cue out,
    which an episode's opening has then (rollout/turns.py).

    Raises ValueError, naming the record: a template is needed and there is none, it refuses the messages,
    or the tokenizer does not know a character.
    """
    messages = _messages(record, tokenizer, chat_template, system_prompt)
    if messages is None:
        text, special = str(record.question), True
    else:
        text = _from_template(record, tokenizer, messages, template_args or {}, tools, cue)
        special = False  # the template has written them already
    try:
        token_ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # a tokenizer may raise anything; the message must have the place
        raise ValueError(
            f"{record.where}: the tokenizer cannot read the question {text[:80]!r}: {error}"
        ) from error
    if special:
        token_ids = _without_appended_eos(tokenizer, text, token_ids)
    if not token_ids:
        raise ValueError(f"{record.where}: the question gives no tokens: {text!r}")
    _check_known(record, tokenizer, text, token_ids)
    return text, token_ids


def _without_appended_eos(tokenizer: Tokenizer, text: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """`token_ids` without the end of the sequence that the tokenizer itself appends (add_eos_token, or a
    post-processor), which is meant for texts that are whole. One that the text spells stays.

    Example: "1+1=" gives [bos 1 + 1 = eos] and becomes [bos 1 + 1 =].
    """
    eos = tokenizer.eos_token_id
    if eos is None or token_ids[-1:] != (eos,):
        return token_ids
    own = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    spelled = len(own) - len(_stripped(own, eos))
    kept = _stripped(token_ids, eos) + (eos,) * spelled
    if len(kept) < len(token_ids):
        _tell_appended_eos(str(getattr(tokenizer, "name_or_path", "")), str(tokenizer.eos_token))
    return kept


def _stripped(token_ids: tuple[int, ...], eos: int) -> tuple[int, ...]:
    """`token_ids` without the eos at their end."""
    end = len(token_ids)
    while end and token_ids[end - 1] == eos:
        end -= 1
    return token_ids[:end]


@functools.lru_cache(maxsize=16)
def _tell_unused(tokenizer: str, names: tuple[str, ...]) -> None:
    """Says it once: a template passes over an argument that it does not know."""
    log.warning(
        "data.template_args: the chat template of %s has no %s, so it changes nothing; is it spelled so?",
        tokenizer,
        ", ".join(names),
    )


@functools.lru_cache(maxsize=16)
def _tell_appended_eos(tokenizer: str, token: str) -> None:
    """Says it once per tokenizer, and not for every record."""
    log.warning(
        "the tokenizer%s appends %s to a text: prompts go without it, since completions continue them",
        f" {tokenizer}" if tokenizer else "",  # one that was made in memory has no name
        token,
    )


def _check_known(record: Record, tokenizer: Tokenizer, text: str, token_ids: tuple[int, ...]) -> None:
    """Raises ValueError where the tokenizer gave its token for the unknown.

    A tokenizer that uses one token for several purposes (GPT-2: <|endoftext|> for all) says nothing by it.
    """
    unknown = tokenizer.unk_token_id
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if unknown is not None and unknown not in others and unknown in token_ids:
        raise ValueError(
            f"{record.where}: the model's tokenizer does not know a part of the question {text[:80]!r} "
            f"(it gives {tokenizer.unk_token!r}); use a model whose vocabulary covers the data"
        )


def _from_template(
    record: Record,
    tokenizer: Tokenizer,
    messages: list[Message],
    template_args: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
    cue: bool = True,
) -> str:
    """The text that the tokenizer's template makes of the messages."""
    unused = [name for name in template_args if name not in str(tokenizer.chat_template)]
    if unused and "chat_template" not in template_args:
        _tell_unused(str(getattr(tokenizer, "name_or_path", "")), tuple(unused))
    prefill = messages[-1]["role"] == "assistant"
    if prefill and not cue:
        raise ValueError(
            f"{record.where}: the last message is the assistant's and would be continued, which no "
            "environment can: end with another role, or unset environment.factory and environment.tools"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=_tools(record) or (list(tools) or None),
                tokenize=False,
                add_generation_prompt=cue and not prefill,
                continue_final_message=prefill,
                **template_args,
            )
        )
    except Exception as error:  # templates are programs of others: jinja2 errors, KeyError, TypeError, ...
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        way_out = "change the messages to what the template allows, or data.template_args"
        if prefill:
            way_out += (
                "; the last message is the assistant's and is continued: end with another role otherwise"
            )
        raise ValueError(
            f"{record.where}: the tokenizer's chat template refuses the messages: {cause}; {way_out}"
        ) from error


def _tools(record: Record) -> list[Any] | None:
    """The `tools` of a record for the template: a list, or the JSON text of one. None where it has none."""
    tools = record.metadata.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{record.where}: 'tools' must be a list of tools or its JSON text: {error.msg} "
                f"at column {error.colno}"
            ) from None
    if tools is not None and tools != "" and not isinstance(tools, list):
        raise ValueError(f"{record.where}: 'tools' must be a list of tools: got {type(tools).__name__}")
    return tools or None


def _messages(
    record: Record, tokenizer: Tokenizer, chat_template: bool, system_prompt: str | None
) -> list[Message] | None:
    """The conversation to render, or None when the question is plain text to be used as it stands."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(record.question, str):
        if not (chat_template and has_template):
            if system_prompt is not None:
                raise ValueError(
                    "data.system_prompt needs a chat template: "
                    + ("data.chat_template is off" if has_template else "the tokenizer has none")
                    + "; unset it or write it into the questions"
                )
            return None
        messages: list[Message] = [{"role": "user", "content": record.question}]
    else:
        if not has_template:
            raise ValueError(
                f"{record.where}: the question is a list of messages, but the tokenizer has no chat "
                "template; use an instruct model or give the questions as text"
            )
        messages = record.question
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(f"{record.where}: has a system message of its own; unset data.system_prompt")
    return [{"role": "system", "content": system_prompt}, *messages]
