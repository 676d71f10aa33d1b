"""Reading questions from .jsonl and .parquet files; every error names the file and the line (or row)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One question before it is rendered: a text or a list of chat messages, its answer, and where
    it came from."""

    where: str
    question: str | list[dict[str, str]]
    answer: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)


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


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: a line must be one JSON object: {error.msg} at column {error.colno}"
                ) from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
    except ArrowException as error:
        raise ValueError(f"{file} must be a parquet file: {error}; give one, or a .jsonl file") from error
    with table:
        for chunk in table.iter_batches():
            for row in chunk.to_pylist():
                yield f"{file}:row {number}", row
                number += 1


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


def _messages(where: str, value: Any, prompt_key: str) -> list[dict[str, str]]:
    rule = f"{where}: {prompt_key!r} must be a text or a list of messages with a text role and content"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{rule}: got {type(value).__name__} {value!r}"[:300])
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError(f"{rule}: got {message!r}"[:300])
    return [{"role": m["role"], "content": m["content"]} for m in value]
