"""From a question to the very tokens the engine receives."""

from __future__ import annotations

from typing import Any

from gspo_dist.data.records import Record


def render(
    record: Record, tokenizer: Any, *, chat_template: bool, system_prompt: str | None
) -> tuple[str, tuple[int, ...]]:
    """(text, token ids) of a question.

    A list of messages, and a text where `chat_template` holds and the tokenizer has a template, is rendered
    by the template, up to and with the cue for the assistant's turn. Any other text is tokenized as it
    stands, with the special tokens the tokenizer adds to a text. Raises ValueError when a template is
    needed and there is none, or when the tokenizer does not know a character.
    """
    messages = _messages(record, tokenizer, chat_template, system_prompt)
    if messages is None:
        text, special = str(record.question), True
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = False  # the template has written them already
    token_ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
    if not token_ids:
        raise ValueError(f"{record.where}: the question gives no tokens: {text!r}")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in token_ids:
        raise ValueError(
            f"{record.where}: the model's tokenizer does not know a part of the question {text[:80]!r} "
            f"(it gives {tokenizer.unk_token!r}); use a model whose vocabulary covers the data"
        )
    return text, token_ids


def _messages(
    record: Record, tokenizer: Any, chat_template: bool, system_prompt: str | None
) -> list[dict[str, str]] | None:
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
        messages = [{"role": "user", "content": record.question}]
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
