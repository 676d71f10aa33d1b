"""Judging while engines sample: a thread waits for the verdicts, so that no engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from gspo_dist.rewards.reward import Item, Judged
from gspo_dist.trainer.buffer import BegunStep


class Judging:
    """Verdicts under way, for one list of finished completions at a time.

    Its thread only asks the rewards. What comes back is noted by the caller's, in `go_on` and `finish`.
    """

    def __init__(self, judge: Callable[[Sequence[Item]], list[Judged]]) -> None:
        """judge: gives the verdicts in order. Nobody else may call it before `finish`."""
        self.judge = judge
        self.thread: ThreadPoolExecutor | None = None
        self.under_way: tuple[BegunStep, list[Item], Future[list[Judged]]] | None = None

    def go_on(self, steps: Iterable[BegunStep]) -> None:
        """Notes verdicts that have come, and has what finished meanwhile judged. Waits for nothing.

        Raises what the judge raised.
        """
        if self.under_way is not None and not self.under_way[2].done():
            return
        self.finish()
        for step in steps:
            if items := step.unjudged():
                self.thread = self.thread or ThreadPoolExecutor(1, thread_name_prefix="judging")
                self.under_way = step, items, self.thread.submit(self.judge, items)
                return

    def finish(self) -> None:
        """Waits for verdicts that are under way, and notes them. Raises what the judge raised."""
        if self.under_way is None:
            return
        (step, items, verdicts), self.under_way = self.under_way, None
        step.take(items, verdicts.result())
