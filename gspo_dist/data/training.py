"""Training prompts as a configuration names them: a source or a mixture, held or streamed."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_dist.config import DataConfig
from gspo_dist.data.blocks import open_rows
from gspo_dist.data.cursor import Cursor, MixedCursor, PromptCursor
from gspo_dist.data.formats import HUB, folder_files, hub_folder
from gspo_dist.data.procedural import is_procedural
from gspo_dist.data.prompts import (
    PromptSource,
    check_disjoint,
    load_prompts,
    load_source,
    readable_prompts,
    to_prompt,
)
from gspo_dist.data.records import BadRows
from gspo_dist.data.stream import CHECKED, StreamCursor, StreamedSource
from gspo_dist.types import Prompt

log = logging.getLogger(__name__)

Check = Callable[[Prompt], None]
"""Raises ValueError for a prompt that cannot be trained on."""


@dataclass(frozen=True)
class TrainingPrompts:
    """The sources that a run trains on."""

    parts: dict[str, PromptSource | StreamedSource]
    weights: dict[str, float]
    """Of each source. Empty without a mixture."""

    def __iter__(self) -> Iterator[Prompt]:
        """Prompts of all sources. Of one that is streamed, the first ones."""
        for part in self.parts.values():
            yield from itertools.islice(part, CHECKED) if isinstance(part, StreamedSource) else part

    def add_check(self, check: Check) -> None:
        """Has prompts of streamed sources checked when their turn comes. The others are at hand."""
        for part in self.parts.values():
            if isinstance(part, StreamedSource):
                part.checks.append(check)

    def judge(self, readable: Check, *, skip: bool) -> None:
        """Has `readable` say of each prompt whether its answer can be judged. Of a streamed source it says so
        when the prompt's turn comes.

        skip: leave out those that cannot. Otherwise the first raises ValueError.
        """
        for name, part in self.parts.items():
            if isinstance(part, StreamedSource):
                part.readable.append(readable)
            else:
                self.parts[name] = readable_prompts(part, readable, skip=skip)

    def cursor(self, *, seed: int, shuffle: bool) -> Cursor:
        """What hands the prompts out. Each source has an order of its own."""
        own: dict[str, Cursor] = {}
        for name, part in self.parts.items():
            if isinstance(part, StreamedSource):
                own[name] = StreamCursor(part, seed=seed, shuffle=shuffle)
            else:
                own[name] = PromptCursor(part, seed=seed, shuffle=shuffle)
        if not self.weights:
            (only,) = own.values()
            return only
        return MixedCursor(own, self.weights)


def load_training(
    config: DataConfig, tokenizer: Any, *, max_prompt_tokens: int, seed: int, **rendering: Any
) -> tuple[TrainingPrompts, PromptSource | None]:
    """(training prompts, held-out prompts or None), checked to share no prompt.

    Raises ValueError, naming file and line, for records that cannot be used. Those of a streamed file are
    looked at when their turn comes. rendering: more arguments of `chat.render`.
    """
    names = list(config.mixture) or [config.train]
    parts: dict[str, PromptSource | StreamedSource] = {}
    for name in names:
        if files := streamed_files(config, name):
            parts[name] = _streamed(config, name, files, tokenizer, max_prompt_tokens, rendering)
        else:
            parts[name] = load_source(config, name, "train", tokenizer, max_prompt_tokens, seed, **rendering)
    train = TrainingPrompts(parts, dict(config.mixture))
    if config.heldout is None:
        return train, None
    known = {"max_prompt_tokens": max_prompt_tokens, "seed": seed, **rendering}
    heldout = load_prompts(config, "heldout", tokenizer, **known)
    check_disjoint(train, heldout)
    held = {prompt.token_ids: prompt.prompt_id for prompt in heldout}
    train.add_check(functools.partial(_not_held_out, held))
    return train, heldout


def _not_held_out(held: dict[tuple[int, ...], str], prompt: Prompt) -> None:
    if prompt.token_ids in held:
        raise ValueError(
            f"{prompt.prompt_id}: train and heldout must share no prompt: it is {held[prompt.token_ids]}; "
            "remove it from one of the two"
        )


def streamed_files(config: DataConfig, source: str) -> list[Path]:
    """The files of a source that is too large to be held: a file, a folder, a data set of the hub.

    Empty where it is held in memory.
    """
    if is_procedural(source):
        return []
    path = hub_folder(source) if source.startswith(HUB) else Path(source).expanduser()
    files = folder_files(path, "train") if path.is_dir() else [p for p in (path,) if p.is_file()]
    return files if sum(file.stat().st_size for file in files) > config.stream_above_mb << 20 else []


def _streamed(
    config: DataConfig,
    name: str,
    files: list[Path],
    tokenizer: Any,
    max_prompt_tokens: int,
    rendering: dict[str, Any],
) -> StreamedSource:
    bad = BadRows(skip=config.bad_rows == "skip")
    made = functools.partial(
        to_prompt,
        config=config,
        tokenizer=tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        rendering=rendering,
    )
    source = StreamedSource(name, open_rows(name, files), config.prompt_key, config.answer_key, made, bad)
    log.warning("%s: %d rows, read as they are needed (data.stream_above_mb)", name, len(source))
    return source
