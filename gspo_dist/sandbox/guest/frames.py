"""Frames between local.py and the guest: a length, then bytes.

What comes from local.py is marshalled. What goes back is never unmarshalled there, because the program might
have written it: names and texts alternate, each with its length.
"""

import marshal
import os
import struct
from typing import Any


def send(descriptor: int, message: dict[str, Any]) -> None:
    """A frame of names and texts; None is the empty text."""
    texts = [encoded(one) for pair in message.items() for one in pair]
    write_frame(descriptor, b"".join(struct.pack("!I", len(text)) + text for text in texts))


def encoded(value: Any) -> bytes:
    return b"" if value is None else str(value).encode("utf-8", "surrogatepass")


def write_frame(descriptor: int, data: bytes) -> None:
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """The next marshalled frame; None at the end."""
    header = read_exactly(descriptor, 4)
    body = None if header is None else read_exactly(descriptor, struct.unpack("!I", header)[0])
    return None if body is None else marshal.loads(body)


def read_exactly(descriptor: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def decoded(body: bytes) -> dict[str, str]:
    """The names and texts of a frame without its length; {} for what is none."""
    found, at = [], 0
    while at < len(body):
        if at + 4 > len(body):
            return {}
        size = struct.unpack_from("!I", body, at)[0]
        found.append(body[at + 4 : at + 4 + size].decode("utf-8", "replace"))
        at += 4 + size
    return dict(zip(found[::2], found[1::2], strict=False))


def marked(value: Any) -> Any:
    """A result with its tuples as lists that say so (protocol.TUPLE). A service is sent this very text."""
    if isinstance(value, tuple):
        return ["\x00tuple", *map(marked, value)]
    if type(value) is list:
        return list(map(marked, value))
    if type(value) is dict:
        return {key: marked(one) for key, one in value.items()}
    return value
