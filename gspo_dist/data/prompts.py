"""Prompts of a run: loaded once, checked, immutable. `cursor` hands them out."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from gspo_dist.config import DataConfig
from gspo_dist.data import procedural
from gspo_dist.data.chat import render
from gspo_dist.data.formats import SUFFIXES, is_data
from gspo_dist.data.records import BadRows, Record, read_records
from gspo_dist.types import Prompt

log = logging.getLogger(__name__)

NAMED = 5
"""Records that a message names. The rest are counted."""


class PromptSource(Sequence[Prompt]):
    """An immutable list of distinct prompts."""

    def __init__(
        self, name: str, prompts: Sequence[Prompt], duplicates: int = 0, too_long: Sequence[str] = ()
    ) -> None:
        """duplicates: records left out because an equal prompt with the same answer stands before them.
        too_long: where the records stand that were left out for their length.

        Raises ValueError where no prompt is left.
        """
        self.name = name
        self.duplicates = duplicates
        self.too_long = tuple(too_long)
        self._prompts = tuple(prompts)
        if not self._prompts:
            raise ValueError(f"data source {name} must hold at least one prompt: got none")

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...

    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every prompt's tokens and answer, in order.

        By it a resumed run tells whether the prompts were edited.
        """
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(repr((prompt.token_ids, prompt.answer)).encode())
        return digest.hexdigest()[:16]


def load_prompts(
    config: DataConfig,
    split: str,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    seed: int,
    **rendering: Any,
) -> PromptSource:
    """The prompts of `split` ("train" or "heldout") in the order of their source.

    rendering: more arguments of `chat.render`, such as the tools of an environment.

    Raises ValueError, naming file and line, for records that cannot be used: malformed, without their
    fields, over `max_prompt_tokens`, or an earlier prompt again with another answer.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be train or heldout: got {split!r}")
    source = config.train if split == "train" else config.heldout
    if source is None:
        raise ValueError("data.heldout is null: there are no held-out prompts to load")
    return load_source(config, source, split, tokenizer, max_prompt_tokens, seed, **rendering)


def load_source(
    config: DataConfig,
    source: str,
    split: str,
    tokenizer: Any,
    max_prompt_tokens: int,
    seed: int,
    **rendering: Any,
) -> PromptSource:
    """`load_prompts` of a source by its name."""
    records = _records(config, source, split, seed)
    return _render_all(config, source, records, tokenizer, max_prompt_tokens, rendering)


def rendered(
    record: Record, config: DataConfig, tokenizer: Any, rendering: Mapping[str, Any]
) -> tuple[str, tuple[int, ...]]:
    """`chat.render` as the configuration asks for it. rendering: more arguments of it."""
    return render(
        record,
        tokenizer,
        chat_template=config.chat_template,
        system_prompt=config.system_prompt,
        template_args=config.template_args,
        **rendering,
    )


def to_prompt(
    record: Record,
    config: DataConfig,
    tokenizer: Any,
    max_prompt_tokens: int,
    rendering: Mapping[str, Any],
) -> Prompt | None:
    """The record as a prompt. None where it is too long and data.too_long is skip.

    Raises ValueError where it is too long otherwise, and what `chat.render` raises.
    """
    text, token_ids = rendered(record, config, tokenizer, rendering)
    if len(token_ids) <= max_prompt_tokens:
        return Prompt(record.where, token_ids, text, record.answer, record.metadata)
    if config.too_long == "skip":
        return None
    raise ValueError(
        f"{record.where}: a prompt must have at most rollout.max_prompt_tokens = {max_prompt_tokens} tokens: "
        f"got {len(token_ids)}; raise the limit, remove the record, or set data.too_long=skip"
    )


def check_disjoint(train: Iterable[Prompt], heldout: Sequence[Prompt]) -> None:
    """Raises ValueError when a held-out prompt is also trained on (the tokens decide, not the ids)."""
    seen = {prompt.token_ids: prompt for prompt in train}
    shared = [(seen[p.token_ids], p) for p in heldout if p.token_ids in seen]
    if shared:
        ours, theirs = shared[0]
        raise ValueError(
            f"train and heldout must share no prompt: {len(shared)} of {len(heldout)} held-out prompts are "
            f"in train, the first {theirs.prompt_id} = {ours.prompt_id}; remove them from one of the two"
        )


def readable_prompts(source: PromptSource, check: Callable[[Prompt], None], *, skip: bool) -> PromptSource:
    """`source` without the prompts for which `check` raises ValueError. They are counted and named.

    Raises that error without `skip`, and ValueError where no prompt is left.
    """
    kept, refused = list[Prompt](), list[str]()
    for prompt in source:
        try:
            check(prompt)
        except ValueError as error:
            if not skip:
                raise
            refused.append(str(error))
        else:
            kept.append(prompt)
    if not refused:
        return source
    told = "; ".join(refused[:NAMED]) + ("; ..." if len(refused) > NAMED else "")
    if not kept:
        raise ValueError(f"data source {source.name} must hold an answer that the reward can read: {told}")
    log.warning("%s: %d rows are left out, as nobody could judge them: %s", source.name, len(refused), told)
    return PromptSource(source.name, kept, source.duplicates, source.too_long)


def _records(config: DataConfig, source: str, split: str, seed: int) -> list[Record]:
    bad = BadRows(skip=config.bad_rows == "skip")
    records = list(source_records(config, source, split, seed, bad))
    if bad.skipped:
        log.warning(
            "%s: %d rows are left out, as they are no records: %s%s",
            source,
            len(bad.skipped),
            "; ".join(bad.skipped[:NAMED]),
            "; ..." if len(bad.skipped) > NAMED else "",
        )
    if not records:
        raise ValueError(f"data file must hold at least one record: {source} is empty")
    return records


def source_records(config: DataConfig, source: str, split: str, seed: int, bad: BadRows) -> Iterable[Record]:
    """The records of one source as they are read. Raises ValueError for a source of no kind."""
    if procedural.is_procedural(source):
        return procedural.make(source, split, config.options, seed)
    if not is_data(source):
        raise ValueError(
            f"data.{split} must be a .jsonl or .parquet file, arithmetic, or reasoning_gym:TASK: "
            f"got {source!r}; files may also end in {', '.join(SUFFIXES)}, a folder is one of save_to_disk, "
            "hub:NAME a data set of the hub"
        )
    of_folder = "test" if split == "heldout" else split
    return read_records(source, config.prompt_key, config.answer_key, split=of_folder, bad=bad)


def _render_all(
    config: DataConfig,
    source: str,
    records: list[Record],
    tokenizer: Any,
    max_prompt_tokens: int,
    rendering: Mapping[str, Any],
) -> PromptSource:
    """Every record as its tokens, without equal ones. The log tells what is left out."""
    first: dict[tuple[int, ...], Prompt] = {}
    duplicates = 0
    too_long: list[str] = []
    for record in records:
        prompt = to_prompt(record, config, tokenizer, max_prompt_tokens, rendering)
        if prompt is None:
            too_long.append(record.where)
            continue
        before = first.setdefault(prompt.token_ids, prompt)
        if before is prompt:
            continue
        if before.answer == prompt.answer:
            duplicates += 1
        else:
            raise ValueError(
                f"{record.where}: the prompt of {before.prompt_id} again with another answer: "
                f"{record.answer!r} and {before.answer!r}; remove one"
            )
    if too_long:
        log.warning(
            "%s: %d of %d records are left out, over rollout.max_prompt_tokens = %d: %s%s",
            source,
            len(too_long),
            len(records),
            max_prompt_tokens,
            ", ".join(too_long[:NAMED]),
            ", ..." if len(too_long) > NAMED else "",
        )
    if not first:
        raise ValueError(
            f"data source {source} must hold at least one prompt: all {len(records)} are over "
            f"rollout.max_prompt_tokens = {max_prompt_tokens}; raise it"
        )
    if duplicates:
        log.warning(
            "%s: %d of %d records are left out, each an earlier prompt again with the same answer",
            source,
            duplicates,
            len(records),
        )
    return PromptSource(source, list(first.values()), duplicates, too_long)
