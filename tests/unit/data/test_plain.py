"""Values keep their meaning on the way to plain JSON, or are refused with their place."""

from __future__ import annotations

import datetime
import json
import re
import uuid
from decimal import Decimal

import pytest

from gspo_dist.data.plain import plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (42, 42),
        (True, True),
        ("x+1", "x+1"),
        (None, None),
        (0.5, 0.5),
        (Decimal("42.00"), 42),
        (Decimal("0.25"), 0.25),
        (Decimal("1E+3"), 1000),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
        (datetime.time(3, 4), "03:04:00"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        ("é".encode(), "é"),
        ({"a": (1, [Decimal(2)])}, {"a": [1, [2]]}),
    ],
)
def test_values_become_plain_and_keep_their_type(value, expected) -> None:
    got = plain("f:1: 'answer'", value)
    assert got == expected
    assert type(got) is type(expected)
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"\xff\xd8\xff", "f:1: 'answer' holds 3 bytes that are no UTF-8 text"),
        (float("nan"), "f:1: 'answer' must be a number: got nan"),
        (Decimal("Infinity"), "f:1: 'answer' must be a number: got Infinity"),
        (
            datetime.timedelta(1),
            "f:1: 'answer' must be a number, a text, a list or a mapping: got a timedelta",
        ),
        ({1: 2}, "f:1: 'answer' must have texts as keys: got 1"),
        ({"a": [b"\xff"]}, "f:1: 'answer'.a[0] holds 1 bytes"),
        ("bad \ud83d end", r"f:1: 'answer' holds half of a character, \ud83d at position 4"),
    ],
)
def test_values_without_a_plain_meaning_are_refused_with_their_place(value, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plain("f:1: 'answer'", value)
