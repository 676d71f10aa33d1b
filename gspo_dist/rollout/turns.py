"""The bridge from what an environment says to the tokens that continue a history.

A history is only ever appended to. What was sampled stays as it was sampled: decoding it and encoding it
again gives other tokens, for which the recorded log-probs say nothing. So the next input is the tokens so
far, and after them the tokens of the answer as the chat template would write it.

    prompt                    sampled            answer                                      sampled
    <user> 2+3? <end>      |  call add <end>  |  <tool> 5 <end> <assistant>               |  it is 5 <end>
             opening: <assistant>                         reply

The template's text around an answer is found by rendering a small conversation. When the bridge is built it
is also checked that the template appends: that a conversation with one more exchange is the text so far and
something after it. Qwen3's, for example, strips the thinking of earlier turns when a user speaks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

Tokenizer = Any
"""An HF tokenizer."""
QUESTION, SAID = "QUESTION-0", ("SAID-1", "SAID-2")
"""Texts of the conversation that finds what a template writes around them. No template would change them."""
THINKING = "<think>\nTHOUGHT\n</think>\n\n"
"""What a reasoning model says first, as a template may strip it."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of a part of a character's bytes."""


class Bridge:
    """Turns as text and as tokens. The plain one: texts follow each other as they stand."""

    def __init__(self, tokenizer: Tokenizer, *, limit: int) -> None:
        """limit: tokens of an answer that are kept."""
        self.tokenizer, self.limit = tokenizer, limit
        special = {*tokenizer.all_special_tokens, *_added_special(tokenizer)}
        self.special = sorted((t for t in special if len(t) > 1), key=len, reverse=True)

    def opening(self, text: str | None) -> list[int]:
        """What stands between the prompt and the first turn: what the reset said, and the cue for a turn."""
        return self._encode(text) if text else []

    def reply(self, so_far: np.ndarray, text: str) -> list[int]:
        """The answer `text` to a turn, up to the next turn. so_far: tokens of the completion, which it
        follows.
        """
        return self._encode(text)

    def said(self, token_ids: np.ndarray) -> str:
        """A turn as text, without special tokens: what an environment reads."""
        return self._decode(token_ids, skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token, special ones included."""
        return [self._decode([token], skip_special_tokens=False) for token in token_ids]

    def cut(self, text: str) -> str:
        """The beginning of `text` that has at most `limit` tokens, with its special tokens defused. It ends
        with a whole character.

        A tool must not be able to end its own message and to speak as somebody else, so a special token that
        its text spells gets a space after its first character.
        """
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        ids = self._encode(text)
        keep = self.limit
        while len(ids) > self.limit:
            # Decoded and encoded again, a beginning may have other tokens, and more of them.
            text = self._decode(ids[:keep], skip_special_tokens=False).rstrip(HALF)
            ids, keep = self._encode(text), keep - 1
        return text

    def _decode(self, token_ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool) -> str:
        # Some tokenizers are told to take spaces away before full stops: a program would not be what it was.
        return str(
            self.tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _added_special(tokenizer: Tokenizer) -> set[str]:
    """Special tokens that are in the vocabulary and that the tokenizer has no name for."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token.content) for token in added.values() if token.special}


class ChatBridge(Bridge):
    """The bridge of a chat template.

    The prompt goes without the cue for the assistant's turn, which the opening has. Raises ValueError, with
    the way out, for a template that changes or strips what was said before, that knows no such role, or that
    writes an answer otherwise than it was given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        limit: int,
        role: str,
        keep_history: bool = False,
        template_args: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """role: of an answer. keep_history: a template that strips thinking is accepted, and the history
        keeps it. tools: schemas that the template describes.
        """
        super().__init__(tokenizer, limit=limit)
        self.role, self.tools = role, list(tools) or None
        self.template_args = dict(template_args or {})
        if self.tools:
            self._check_described()
        question = [{"role": "user", "content": QUESTION}]
        first, whole = self._render(question, cue=False), self._render(question, cue=True)
        if not whole.startswith(first):
            raise self._refusal("writes a question otherwise when the assistant's turn follows")
        self.cue = whole[len(first) :]
        self.close = self._after_said([])
        """What the template writes after a turn."""
        self._check_appends(strict=not keep_history)

    def opening(self, text: str | None) -> list[int]:
        # What a reset says is one more message to the policy, before it speaks.
        return self._encode((self._message("user", text) if text else "") + self.cue)

    def reply(self, so_far: np.ndarray, text: str) -> list[int]:
        glue = self._encode(self.close + self._message(self.role, text) + self.cue)
        # The token that ends a turn was sampled, unless the turn ended with another one.
        return glue[1:] if len(so_far) and int(so_far[-1]) == glue[0] else glue

    def _message(self, role: str, text: str) -> str:
        """One message of another role than the assistant's, as the template writes it."""
        after = self._after_said([{"role": role, "content": text}])
        if not after.startswith(self.close):
            raise self._refusal(f"ends a turn otherwise when a message of role {role!r} follows")
        return after[len(self.close) :]

    def _after_said(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What the template writes after the words of a turn that `messages` follow."""
        talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": SAID[0]}, *messages]
        _, found, tail = self._render(talk, cue=False).partition(SAID[0])
        if not found:
            raise self._refusal("does not write the assistant's words as they are")
        return tail

    def _check_described(self) -> None:
        """Says so where prompts do not describe the tools."""
        question = [{"role": "user", "content": QUESTION}]
        if self._render(question, cue=True) == self._render(question, cue=True, described=False):
            log.warning(
                "the chat template does not describe tools: the policy is told of none, unless its prompts do"
            )

    def _check_appends(self, *, strict: bool) -> None:
        """An answer is written as it is. strict: the text of two exchanges begins with that of one, and that
        with the question's, with the thinking that a reasoning model says first.
        """
        thinking = THINKING if "think" in str(self.tokenizer.chat_template) else ""
        talk: list[dict[str, str]] = [{"role": "user", "content": QUESTION}]
        expected = self._render(talk, cue=True)
        for number, said in enumerate(SAID):
            answer = f"ANSWER-{number}"
            # A cue may have opened the thinking already.
            sampled = thinking.removeprefix("<think>\n") if self.cue.endswith("<think>\n") else thinking
            talk += [
                {"role": "assistant", "content": thinking + said},
                {"role": self.role, "content": answer},
            ]
            text = self._render(talk, cue=True)
            if answer not in text:
                raise self._refusal(f"does not write the text of a message of role {self.role!r}")
            if strict and not text.startswith(expected + sampled + said):
                what = "strips or changes what was said before when another message follows"
                raise self._refusal(what, thinking=bool(thinking))
            expected = text

    def _render(self, messages: Sequence[Mapping[str, Any]], *, cue: bool, described: bool = True) -> str:
        """The conversation as the template writes it. described: with the tools."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=self.tools if described else None,
                    tokenize=False,
                    add_generation_prompt=cue,
                    **self.template_args,
                )
            )
        except Exception as error:  # templates are programs of others
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            roles = [message["role"] for message in messages]
            raise self._refusal(f"refuses messages of the roles {', '.join(roles)} ({cause})") from error

    def _refusal(self, what: str, *, thinking: bool = False) -> ValueError:
        way_out = 'set environment.role ("user" or "tool"), or a template that appends (data.template_args)'
        if thinking:
            way_out += (
                "; or environment.keep_history=true, where the policy is trained on histories that keep "
                "their thinking"
            )
        return ValueError(
            "the chat template cannot be bridged: a history of turns is only ever appended to, and the "
            f"template {what} (environment.role is {self.role!r}); {way_out}"
        )


def make_bridge(
    tokenizer: Tokenizer,
    *,
    chat: bool,
    limit: int,
    role: str,
    keep_history: bool,
    template_args: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Bridge:
    """The bridge of a run. chat: prompts are rendered by the tokenizer's chat template.

    Raises ValueError for a template that cannot be bridged.
    """
    if not chat:
        return Bridge(tokenizer, limit=limit)
    return ChatBridge(
        tokenizer, limit=limit, role=role, keep_history=keep_history, template_args=template_args, tools=tools
    )


def stop_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, ...]:
    """The token of each text of `environment.stop`. ValueError for a text of no or several tokens."""
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"environment.stop must hold texts of one token each: got {text!r}, which has {len(ids)}; "
                "leave it out, or take one that the tokenizer knows"
            )
        found.append(int(ids[0]))
    return tuple(found)
