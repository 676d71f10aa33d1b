"""Values of a record as plain JSON values. What has no meaning as one is refused."""

from __future__ import annotations

import datetime
import math
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


def plain(where: str, value: Any) -> Any:
    """`value` in numbers, texts, truth values, null, lists and mappings with text keys.

    - Decimal: a whole number where it is one, else the nearest float: Decimal("42.00") is 42.
    - Dates and times: their ISO text. UUID: its text.
    - bytes: the text that they encode in UTF-8.

    where: names the record and the field. Raises ValueError for everything else: other types, bytes that
    are no text, numbers that are none (NaN), and texts with half of a surrogate pair.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _whole_text(where, value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{where} must be a number: got {value}; repair the record or leave the field out"
            )
        return value
    if isinstance(value, Decimal):
        return _number(where, value)
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return _decoded(where, bytes(value))
    if isinstance(value, Mapping):
        return {_key(where, k): plain(f"{where}.{k}", v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(f"{where}[{i}]", v) for i, v in enumerate(value)]
    raise ValueError(
        f"{where} must be a number, a text, a list or a mapping: got a {type(value).__name__}; write it "
        "as one of these, or leave the field out"
    )


def _key(where: str, key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where} must have texts as keys: got {key!r}; write the keys as texts")
    return key


def _number(where: str, value: Decimal) -> int | float:
    if not value.is_finite():
        raise ValueError(f"{where} must be a number: got {value}; repair the record")
    return int(value) if value == value.to_integral_value() else float(value)


def _decoded(where: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{where} holds {len(value)} bytes that are no UTF-8 text; write it as text, or leave it out"
        ) from None


def _whole_text(where: str, text: str) -> str:
    """`text` itself. Raises ValueError for half of a surrogate pair.

    JSON can spell one ("\\ud83d"), but no tokenizer and no file takes it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a character, \\u{ord(text[error.start]):04x} at position {error.start}: "
            "the text was cut within an emoji, for example; repair the record"
        ) from None
    return text
