"""Several engines as one: which engine has which work, and what becomes of it when an engine dies.

An engine that dies loses what it samples in. Its work is known here up to its last slice, as plain data, and
goes on at the others with the very tokens that it would have had. What it sampled since is sampled again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gspo_dist.failures import Event, first_line
from gspo_dist.rollout.engine import Growth, Progress, generate
from gspo_dist.rollout.pool import NoEngineLeft, deal
from gspo_dist.types import Completion, Prompt, SamplingSpec, Work, WorkKey

Answers = tuple[dict[str, Any], dict[str, Exception]]
"""Answers by engine, and why the engines that gave none are dead."""
PING_S = 30.0
"""Longest wait for an engine's `info`. It answers at once, unless it is loading a bucket of weights."""


class Fleet:
    """The books of a pool of engines. A subclass calls the engines (`each`) and hears of deaths (`bury`)."""

    runs_beside = True

    def __init__(self, names: Sequence[str], patience_s: float) -> None:
        """patience_s: seconds that an engine may take for an answer, beyond those that it shall sample."""
        self.patience_s = patience_s
        self.names = list(names)
        """All engines, alive or not."""
        self.alive = list(names)
        """Those that sample, in the order of `names`."""
        self.held: dict[str, dict[WorkKey, Work]] = {name: {} for name in names}
        """What each has in the making, as it was submitted."""
        self.growth: dict[str, list[Growth]] = {name: [] for name in names}
        """What each has told since."""
        self.told_before: dict[str, dict[WorkKey, int]] = {name: {} for name in names}
        """How many of those are of before the work came: one that has finished a turn may come again."""
        self.stranded: list[Work] = []
        """Work that no engine is left for."""
        self.deaths: dict[str, str] = {}
        """Engines that are not alive -> how they ended."""
        self.events: list[Event] = []
        """What happened since `take_events` was called last."""

    def each(self, method: str, arguments: Mapping[str, tuple[Any, ...]], timeout: float) -> Answers:
        """Calls `method` of the named engines side by side, each with its arguments."""
        raise NotImplementedError

    def bury(self, name: str, error: Exception) -> None:
        """Called once for an engine that died: ends what is left of it, and may start another."""

    def newcomers(self, *, wait: bool) -> list[str]:
        """Dead engines whose successor is up, each told once. wait: for the first, if one is coming."""
        return []

    def take_events(self) -> list[Event]:
        told, self.events = self.events, []
        return told

    def ask(self, method: str, *arguments: Any, timeout: float) -> dict[str, Any]:
        """The same call to every engine that is alive; answers of those that stay so.

        NoEngineLeft: none does.
        """
        answers, failures = self.each(method, dict.fromkeys(self.alive, arguments), timeout)
        self.lose(failures)
        if not self.alive:
            raise self.none_left()
        return answers

    def submit(self, work: Sequence[Work]) -> None:
        waiting = list(work)
        while waiting:
            if not self.alive:
                self.stranded += waiting
                raise self.none_left()
            # What comes while others run, as the next turn of an episode does, goes to who has the least.
            idle_first = sorted(self.alive, key=lambda name: len(self.held[name]))
            dealt = dict(zip(idle_first, deal(waiting, len(self.alive)), strict=True))
            dealt = {name: items for name, items in dealt.items() if items}
            for name, items in dealt.items():
                self.held[name] |= {item.key: item for item in items}
                self.told_before[name] |= dict.fromkeys((i.key for i in items), len(self.growth[name]))
            _, failures = self.each(
                "submit", {name: (items,) for name, items in dealt.items()}, self.patience_s
            )
            waiting = self.lose(failures)

    def advance(
        self, ticks: int | Mapping[str, int] | None = None, seconds: float | None = None
    ) -> dict[str, Progress]:
        asked = {
            name: (ticks.get(name, 0) if isinstance(ticks, Mapping) else ticks, seconds)
            for name in self.alive
            if self.held[name]
        }
        told, failures = self.each("advance", asked, self.patience_s + (seconds or 0.0))
        for name, progress in told.items():
            self.growth[name].append(progress.growth)
            for key in progress.finished:
                del self.held[name][key]
            if not self.held[name]:
                self._forget(name)  # an evaluation has the same keys again
        orphans = self.lose(failures)
        if orphans:
            self.submit(orphans)
        return told

    def withdraw(self) -> list[Work]:
        busy = {name: () for name in self.alive if self.held[name]}
        told, failures = self.each("withdraw", busy, self.patience_s)
        left = self.stranded + [item for items in told.values() for item in items]
        for name in told:
            self._forget(name)
        left += self.lose(failures)
        self.stranded = []
        return sorted(left, key=lambda item: item.key)

    def lose(self, failures: Mapping[str, Exception]) -> list[Work]:
        """Takes dead engines off the books. Returns their work, as they last reported it."""
        orphans: list[Work] = []
        for name, error in failures.items():
            known = self.held[name]
            for number, growth in enumerate(self.growth[name]):
                for key, more in growth.parts().items():
                    if key in known and number >= self.told_before[name][key]:
                        known[key] = known[key].extended(more)
            orphans += known.values()
            self._forget(name)
            self.alive.remove(name)
            self.deaths[name] = first_line(error)
            self.events.append(Event("engine_death", name, self.deaths[name]))
            self.bury(name, error)
        return sorted(orphans, key=lambda item: item.key)

    def start_weight_update(self, timeout: float) -> None:
        """Opens a publication on every engine, also on those that came up since the last one.

        They hold the weights of the model folder till then, so they sample nothing before.
        """
        for name in self.newcomers(wait=not self.alive):
            self.alive = [other for other in self.names if other in {*self.alive, name}]
            self.events.append(Event("engine_return", name, f"after: {self.deaths.pop(name)}"))
        self.ask("start_weight_update", timeout=timeout)

    def abandon_update(self) -> bool:
        """Whether a publication failed because an engine died.

        Then the others give up the half that they hold and are ready for another. One that cannot is replaced
        like the dead one.
        """
        _, failures = self.each("info", dict.fromkeys(self.alive, ()), PING_S)
        if not failures:
            return False
        self.lose(failures)
        _, failures = self.each("abandon_weight_update", dict.fromkeys(self.alive, ()), PING_S)
        self.lose(failures)
        return True

    def _forget(self, name: str) -> None:
        self.held[name], self.growth[name], self.told_before[name] = {}, [], {}

    def none_left(self) -> NoEngineLeft:
        how = "; ".join(f"{name}: {end}" for name, end in self.deaths.items())
        return NoEngineLeft(f"no engine is left ({how})")

    @property
    def in_the_making(self) -> int:
        """Completions that the engines hold."""
        return sum(len(held) for held in self.held.values())

    def finish_all(self, slice_s: float = 1.0) -> Mapping[WorkKey, Completion]:
        """What `generate` waits for."""
        finished: dict[WorkKey, Completion] = {}
        while self.in_the_making:
            for progress in self.advance(seconds=slice_s).values():
                finished |= progress.finished
        return finished

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        if self.in_the_making:
            raise ValueError(
                f"generate needs engines without work: they have {self.in_the_making} completions; "
                "withdraw them"
            )
        return generate(self, prompts, spec, request_ids)
