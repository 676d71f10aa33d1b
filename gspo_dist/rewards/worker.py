"""What runs in a reward process, which its parent can end.

The reward runs in the main thread of a process of its own. It may set alarms, fork, crash or call exit: the
deadline lies with the parent (pool.py), which kills this process and all that it started.

    parent                      worker
    ------                      ------
    RewardConfig            ->  imports the reward
                            <-  Answer("ready") or Answer("refused", why), once
    [Item, ...]             ->  calls it for each
                            <-  Answer("judged", Judged) or Answer("failed", why), one per item
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

PARENT_CHECK_S = 1.0


class Answer(NamedTuple):
    """What a worker says."""

    kind: str
    """ready | refused | judged | failed."""
    value: Any = None
    """The verdict of `judged`; the reason of `refused` and `failed`."""
    traceback: str = ""
    """Of `failed`: where in the reward."""


class Later(ModuleType):
    """A module that is imported when somebody first asks it for something."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def main(descriptor: int, parent: int, serving: Callable[[Connection], None] | None = None) -> None:
    """Serves the connection behind `descriptor` until the process `parent` closes it or ends.

    serving: what answers there, by default `serve`.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # What a reward prints goes to the log of the process that started it, never into another
    # protocol on stdout.
    os.dup2(2, 1)
    # The records that travel are defined beside tensors, and importing torch takes 1.5 s. Few
    # rewards need it.
    if "torch" not in sys.modules and (spec := importlib.util.find_spec("torch")) is not None:
        sys.modules["torch"] = Later("torch")
        sys.modules["torch"].__spec__ = spec
    (serving or serve)(Connection(descriptor))


def serve(connection: Connection) -> None:
    """Answers a parent until it closes the connection."""
    import traceback

    from gspo_dist.rewards.reward import RewardError, judge_rollouts, resolve_reward

    try:
        function = resolve_reward(connection.recv())
    except ValueError as error:
        connection.send(Answer("refused", str(error)))
        return
    connection.send(Answer("ready"))
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return  # the parent has closed the connection, or is gone
        for verdict in judge_rollouts(function, items):
            if isinstance(verdict, RewardError):
                # The cause may not be picklable, so its traceback travels as text.
                trace = "".join(traceback.format_exception(verdict.__cause__ or verdict))
                connection.send(Answer("failed", str(verdict), trace))
            else:
                connection.send(Answer("judged", verdict))


def _end_with(parent: int) -> None:
    """Ends this process and all that it started when the parent is gone: nobody would kill a
    reward that hangs.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)
