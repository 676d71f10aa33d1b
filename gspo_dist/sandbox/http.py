"""JSON to a service and back, with retries: what is down for a moment must not end a run."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Answers that another attempt may change."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0


class HttpError(RuntimeError):
    """A service that gave no usable answer after all attempts; the message names it."""


def post_json(
    url: str,
    message: Any,
    seconds: float,
    attempts: int = 4,
    headers: Mapping[str, str] | None = None,
    first_pause_s: float = FIRST_PAUSE_S,
) -> Any:
    """The JSON that `url` answers.

    seconds: deadline of one attempt. Pauses between attempts double from `first_pause_s`, each shortened by
    up to a half at random, so that many callers do not come back together. Answers that say the request is
    wrong (400, 401, 404, ...) are not retried. Raises HttpError.
    """
    data = json.dumps(message).encode()
    why = ""
    for attempt in range(attempts):
        if attempt:
            pause = min(LONGEST_PAUSE_S, first_pause_s * 2 ** (attempt - 1))
            time.sleep(pause * random.uniform(0.5, 1.0))
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            why = f"status {error.code}: {error.read()[:300].decode('utf-8', 'replace')}"
            if error.code not in RETRIED:
                break
        except (OSError, ValueError) as error:  # refused, cut off, late, or no JSON
            why = f"{type(error).__name__}: {error}"
    raise HttpError(f"{url} gave no usable answer in {attempt + 1} attempts: {why}")
