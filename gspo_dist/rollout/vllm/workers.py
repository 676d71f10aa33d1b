"""What an engine says when one of its tensor-parallel workers has ended."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

Verb = TypeVar("Verb", bound=Callable[..., Any])

NEWS_S = 2.0
"""How long the news of a worker's end may be behind the error of the other workers, who miss it."""


def names_lost_workers(verb: Verb) -> Verb:
    """A verb of `VllmEngine` whose failure is explained where a worker is gone: RuntimeError instead.

    vllm 0.30.0 ends the other workers then, and what the caller sees of it is "cancelled", seconds later.
    """

    @functools.wraps(verb)
    def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return verb(engine, *args, **kwargs)
        except Exception as error:
            count = engine.config.tensor_parallel
            if count == 1 or not _lost_a_worker(engine.llm):
                raise
            raise RuntimeError(
                f"{engine.name} lost one of its {count} tensor-parallel workers in {verb.__name__}: its log "
                "says which ('died unexpectedly') and with what exit code; -9 is a kill, mostly for want of "
                "memory"
            ) from error

    return cast(Verb, call)


def _lost_a_worker(llm: Any) -> bool:
    executor = llm.llm_engine.model_executor
    deadline = time.monotonic() + NEWS_S
    while not executor.is_failed and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(executor.is_failed)
