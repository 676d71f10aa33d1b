"""Files that cannot be read are named with their line and the way out."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from gspo_dist.data.records import read_file


def read(path: Path):
    return read_file(str(path), "prompt", "answer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "a", "answer": 1}\n{"prompt": "caf\xe9", "answer": 1}\n',
            "train.jsonl:2: the line must be UTF-8: byte 0xe9 at column 16 is not; convert it: iconv",
        ),
        (
            '{"prompt": "a", "answer": 1}\n'.encode("utf-16"),
            "train.jsonl must be UTF-8: it is UTF-16; c",
        ),
        (
            b'{"prompt": "bad \\ud83d end", "answer": "1"}\n',
            "train.jsonl:1: 'prompt' holds half of a character",
        ),
        (
            b'{"prompt": "a", "answer": ',
            "train.jsonl:1: a line must be one JSON object: Expecting value at column",
        ),
    ],
)
def test_text_that_is_not_utf8_is_named_by_line(tmp_path, content, message) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(path)


def test_a_mark_of_utf8_before_the_first_line_is_no_part_of_it(tmp_path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n')
    assert [(r.question, r.answer) for r in read(path)] == [("a", 1)]


def test_answers_of_one_file_may_be_of_several_types(tmp_path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "2*21=", "answer": 42}\n{"prompt": "(x+1)/1=", "answer": "x+1"}\n')
    answers = [record.answer for record in read(path)]
    assert answers == [42, "x+1"]
    assert type(answers[0]) is int


def test_a_parquet_file_gives_plain_values(tmp_path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    columns = {
        "prompt": ["a", "b"],
        "answer": [Decimal("42.00"), Decimal("0.50")],
        "day": [datetime.date(2026, 1, 2), None],
    }
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert [(r.answer, r.metadata["day"]) for r in read(path)] == [(42, "2026-01-02"), (0.5, None)]


def test_a_torn_parquet_file_is_named_with_a_way_out(tmp_path) -> None:
    import pyarrow
    from pyarrow import parquet

    whole, torn = tmp_path / "whole.parquet", tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 100, "answer": ["b"] * 100}), whole)
    content = whole.read_bytes()
    # Torn at its end, and damaged in its pages with the end intact.
    damaged = content[:4] + b"\x00" * 40 + content[44:]
    for data in (content[: len(content) // 2], damaged):
        torn.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"train.parquet must be a parquet file: it cannot be read.*copy it"
        ):
            read(torn)


@pytest.mark.parametrize(
    "messages",
    [
        [{"content": "no role"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        ["text"],
        [],
        {"role": "user", "content": "x"},
    ],
)
def test_messages_without_role_or_content_are_refused(tmp_path, messages) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": messages, "answer": 1}) + "\n")
    with pytest.raises(ValueError, match=r"train.jsonl:1: 'prompt' must be a text or a list of messages"):
        read(path)


def test_every_field_of_a_message_is_read_except_nulls(tmp_path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get"}}], "name": None}
    told = {"role": "tool", "content": "sunny", "name": "get", "tool_call_id": "1", "reasoning_content": "r"}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": [call, told], "answer": 1}) + "\n")
    assert read(path)[0].question == [{"role": "assistant", "tool_calls": call["tool_calls"]}, told]
