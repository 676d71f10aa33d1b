"""How a command ends: 0 done, 1 a failed run, 2 bad input, 130 interrupted."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


def fail(message: str, status: int) -> NoReturn:
    """Ends the command with one message on stderr."""
    print(f"gspo: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def guarded(work: Callable[[], T]) -> T:
    """What `work` returns. Bad input (ValueError) ends with status 2 and one message.

    A failed run ends with status 1, and GSPO_TRACEBACK=1 also prints its traceback.
    """
    try:
        return work()
    except ValueError as error:
        fail("\n".join([str(error), *_notes(error)]), 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        # The one place that catches everything: a user gets a message, whatever a library raises.
        if os.environ.get("GSPO_TRACEBACK"):
            traceback.print_exc()
        hint = "(GSPO_TRACEBACK=1 shows the traceback)"
        fail("\n".join([f"{type(error).__name__}: {error}", *_notes(error), hint]), 1)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
