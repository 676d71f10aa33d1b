"""Reading questions from .jsonl and .parquet files. Every error names the file and the line (or row)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def read_file(path: str, prompt_key: str, answer_key: str) -> list[Record]:
    """The records of a file. A key with dots reaches into nested objects ("reward_model.ground_truth").

    Raises ValueError for a missing, empty or malformed file, or a record without its keys.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"data file must exist: {file} does not; give a .jsonl or .parquet file")
    rows = _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)
    records = [_record(where, row, prompt_key, answer_key) for where, row in rows]
    if not records:
        raise ValueError(f"data file must hold at least one record: {file} is empty")
    return records


_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    # Bytes, not text: only so does an error of the encoding know its line.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            if number == 1:
                if line.startswith(_UTF16):
                    raise ValueError(f"{file} must be UTF-8: it is UTF-16; {_convert(file, 'UTF-16')}")
                line = line.removeprefix(_UTF8_MARK)
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: the line must be UTF-8: byte 0x{line[error.start]:02x} at column "
                    f"{error.start + 1} is not; {_convert(file, 'LATIN1')}, if that is what the file is in"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: a line must be one JSON object: {error.msg} at column {error.colno}"
                ) from error


def _convert(file: Path, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {file.name} > utf8.jsonl"


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for chunk in table.iter_batches():
                for row in chunk.to_pylist():
                    yield f"{file}:row {number}", row
                    number += 1
    except (ArrowException, OSError) as error:
        cause = " ".join(str(error).split())  # pyarrow's messages have several lines
        raise ValueError(
            f"{file} must be a parquet file: it cannot be read from row {number} on ({cause}); copy it "
            "again, or give a .jsonl file"
        ) from error


def _lookup(where: str, row: Mapping[str, Any], key: str, option: str) -> Any:
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{where}: no field {key!r}: has {sorted(row)}; set {option} to the right one")
        value = value[part]
    return value


def _record(where: str, row: Any, prompt_key: str, answer_key: str) -> Record:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object: got {type(row).__name__}")
    row = {key: plain(f"{where}: {key!r}", value) for key, value in row.items()}
    question = _lookup(where, row, prompt_key, "data.prompt_key")
    answer = _lookup(where, row, answer_key, "data.answer_key")
    if answer is None:
        raise ValueError(
            f"{where}: the answer ({answer_key!r}) is null; a reward would have nothing to compare with"
        )
    if not isinstance(question, str):
        question = _messages(where, question, prompt_key)
    elif not question.strip():
        raise ValueError(f"{where}: the question ({prompt_key!r}) is an empty text")
    rest = {k: v for k, v in row.items() if k not in (prompt_key, answer_key)}
    return Record(where, question, answer, rest)


def _messages(where: str, value: Any, prompt_key: str) -> list[Message]:
    """The messages as they are, without fields that are null.

    A parquet column has every field in every row, null where a message goes without it.
    """
    rule = (
        f"{where}: {prompt_key!r} must be a text or a list of messages, each with a role and with content or "
        "tool_calls"
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
