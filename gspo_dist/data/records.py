"""Records from the rows of a file. Every error names the file and the line (or row)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gspo_dist.data import schemas
from gspo_dist.data.formats import BadRow, rows
from gspo_dist.data.plain import plain

Message = dict[str, Any]
"""One chat message: `role`, `content`, and whatever else the tokenizer's template reads."""


@dataclass(frozen=True)
class Record:
    """One question before it is rendered."""

    where: str
    """Where it came from: "train.jsonl:17"."""
    question: str | list[Message]
    """A text, or chat messages."""
    answer: Any
    """What the reward compares with, in the type that the file gives it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the record."""


@dataclass
class BadRows:
    """What is done about rows that are no records: stop at the first, or skip and count them."""

    skip: bool = False
    skipped: list[str] = field(default_factory=list)
    """The messages of those that were skipped."""

    def take(self, error: ValueError) -> None:
        """Raises `error`, or notes it."""
        if not self.skip:
            raise error
        self.skipped.append(str(error))


def read_file(
    path: str, prompt_key: str, answer_key: str, *, split: str = "train", bad: BadRows | None = None
) -> list[Record]:
    """The records of a file. A key with dots reaches into nested objects ("reward_model.ground_truth").

    Raises ValueError for a missing, empty or malformed file, or a record without its keys (see `bad`).
    """
    records = list(read_records(path, prompt_key, answer_key, split=split, bad=bad))
    if not records:
        skipped = (
            f": all {len(bad.skipped)} rows are bad, the first: {bad.skipped[0]}"
            if bad and bad.skipped
            else ""
        )
        raise ValueError(f"data file must hold at least one record: {path} is empty{skipped}")
    return records


def read_records(
    path: str, prompt_key: str, answer_key: str, *, split: str = "train", bad: BadRows | None = None
) -> Iterator[Record]:
    """`read_file`, one record at a time."""
    bad = bad or BadRows()
    for where, row in rows(path, split):
        try:
            yield to_record(where, row, prompt_key, answer_key)
        except ValueError as error:
            bad.take(error)


def to_record(where: str, row: Any, prompt_key: str, answer_key: str) -> Record:
    """The record that a row holds. Raises ValueError that names its place."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object: got {type(row).__name__}")
    row = {key: plain(f"{where}: {key!r}", value) for key, value in row.items()}
    question_at = _field(where, row, schemas.question_key(row, prompt_key), prompt_key, "data.prompt_key")
    question = schemas.as_messages(schemas.lookup(row, question_at)[1])
    answer_at = schemas.answer_key(row, answer_key)
    if answer_at is None and question_at == "messages" and answer_key == schemas.DEFAULT_ANSWER:
        question, answer = schemas.split_conversation(question)
        answer_at = answer_key if answer is not None else None
    else:
        answer = schemas.lookup(row, answer_at)[1] if answer_at else None
    answer_at = _field(where, row, answer_at, answer_key, "data.answer_key")
    if answer is None:
        raise ValueError(
            f"{where}: the answer ({answer_at!r}) is null; a reward would have nothing to compare with"
        )
    if not isinstance(question, str):
        question = _messages(where, question, question_at)
    elif not question.strip():
        raise ValueError(f"{where}: the question ({question_at!r}) is an empty text")
    rest = {k: v for k, v in row.items() if k not in (question_at, answer_at)}
    return Record(where, question, schemas.answer_of(answer_at, answer), rest)


def _field(where: str, row: Mapping[str, Any], found: str | None, wanted: str, option: str) -> str:
    if found is None:
        raise ValueError(f"{where}: no field {wanted!r}: has {sorted(row)}; set {option} to the right one")
    return found


def _messages(where: str, value: Any, prompt_key: str) -> list[Message]:
    """The messages as they are, without fields that are null.

    A parquet column has every field in every row, null where a message goes without it.
    """
    rule = (
        f"{where}: {prompt_key!r} must be a text or a list of messages, each with a role and with content "
        "or tool_calls"
    )
    if not isinstance(value, list) or not value:
        raise ValueError(f"{rule}: got {type(value).__name__} {value!r}"[:300])
    messages = []
    for message in value:
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        content = given.get("content")
        # Content is a text, or parts as multimodal templates take them; only a call of tools goes without.
        told = isinstance(content, (str, list)) or (content is None and given.get("tool_calls"))
        if not isinstance(given.get("role"), str) or not told:
            raise ValueError(f"{rule}: got {message!r}"[:300])
        messages.append(given)
    return messages
