"""The episodes of a run: environment processes of this host, and the deadlines that their parent keeps.

An episode stays in the process where it began. One that misses its deadline, raises or ends its process costs
itself: the process is replaced, and its other episodes are made again in the new one when they go on
(worker.py says how).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Protocol

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.protocol import EnvironmentFailure, Observation
from gspo_dist.environments.resolve import located
from gspo_dist.environments.worker import Call, End
from gspo_dist.failures import Event
from gspo_dist.rewards.pool import EXIT_S, START_TIMEOUT_S, Worker, heard
from gspo_dist.rewards.worker import Answer
from gspo_dist.types import WorkKey

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 100
"""So many failures in a row are an environment that is broken, or a service that is gone."""
AHEAD_BYTES = 64 * 1024
"""Calls that a process has at hand behind the one it answers. The trainer listens between two slices of
sampling alone, and a process that had one call at a time would wait for it after every answer. More than this
might fill the pipe while the process waits for a reader of its answers: then both would wait for ever."""
AHEAD_MESSAGES = 32
"""Messages that a process may not have read yet. A socket of Linux takes about 160 small ones, whatever their
bytes. A parent that waits for room there keeps no deadline: a process that hangs would hold it for ever."""
DEATHS_IN_A_ROW = 5
"""So many processes in a row that end while they import an environment that was imported before."""


@dataclass(frozen=True)
class Reply:
    """What became of a call."""

    key: WorkKey
    observation: Observation = field(default_factory=Observation)
    failed: str = ""
    """timeout, crash or error where there is no answer."""
    why: str = ""
    """The failure in words."""
    state: str | None = None
    """The environment's, after its answer."""
    is_diverged: bool = False
    """Whether the episode must be begun again, because it cannot be made again as it was."""
    is_replayed: bool = False
    """Whether it was made again by its turns."""


class Given(NamedTuple):
    """A call that a process has."""

    call: Call
    seconds: float
    """Its deadline, from the answer before it on."""
    size: int
    """Its bytes in the pipe."""
    is_first: bool
    """Whether its message begins with it."""
    is_wanted: bool = True
    """Whether somebody waits for its answer: its episode was not ended in the meantime."""


class EnvironmentPool(Protocol):
    """Whatever plays the environments of a run."""

    def start(self) -> dict[str, Any]:
        """Waits until the environment is imported. Returns `facts`. ValueError: it cannot be."""
        ...

    def submit(self, calls: Sequence[Call]) -> None:
        """Takes calls to answer, at most one of an episode at a time. It does not wait."""
        ...

    def poll(self, seconds: float, mine: Callable[[WorkKey], bool] = lambda key: True) -> list[Reply]:
        """The replies that are there, after at most `seconds` of waiting for a first one.

        mine: whose replies are wanted; those of others are kept for them. EnvironmentFailure: too many failed
        in a row.
        """
        ...

    def end(self, keys: Iterable[WorkKey]) -> None:
        """These episodes are over. What is asked for them is not answered any more."""
        ...

    def take_events(self) -> list[Event]:
        """Deaths of environment processes since the last call."""
        ...

    def close(self) -> None:
        """Ends what the pool started. A second call does nothing."""
        ...


class LocalEnvironmentPool:
    """Plays episodes in `environment.workers` processes of this host.

    Each works on one call at a time, in the order in which they came, and has the next ones at hand.
    """

    def __init__(
        self, config: EnvironmentConfig, form: str = "hermes", env: Mapping[str, str] | None = None
    ) -> None:
        """Starts the processes, with `env` in their environment; `start` waits for them.

        form: of a model's calls (tools.FORMATS).
        """
        self.config, self.form, self.env = located(config), form, dict(env or {})
        self.workers = [self._worker() for _ in range(config.workers)]
        self.waiting: list[deque[Call]] = [deque() for _ in self.workers]
        """Calls of each worker that it has not been given."""
        self.given: list[deque[Given]] = [deque() for _ in self.workers]
        """What each has been given and has not answered; it works on the first."""
        self.present: list[set[WorkKey]] = [set() for _ in self.workers]
        """Episodes that each process holds."""
        self.homes: dict[WorkKey, int] = {}
        """The worker of each episode."""
        self.over: list[list[WorkKey]] = [[] for _ in self.workers]
        """Episodes that have ended, which each process has not been told."""
        self.unheard = [0] * len(self.workers)
        """Messages without a call that each process was sent since its last answer."""
        self.replies: deque[Reply] = deque()
        self.failures = 0
        self.deaths = 0
        """Processes in a row that ended while they imported the environment once more."""
        self.facts: dict[str, Any] = {}
        self.events: list[Event] = []

    def _worker(self) -> Worker:
        return Worker((self.config, self.form), "gspo_dist.environments.worker", self.env)

    def start(self) -> dict[str, Any]:
        try:
            while not all(worker.ready for worker in self.workers):
                self._listen(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        return self.facts

    def submit(self, calls: Sequence[Call]) -> None:
        homes = Counter(self.homes.values())
        for call in calls:
            if call.key not in self.homes:
                self.homes[call.key] = min(range(len(self.workers)), key=lambda i: (homes[i], i))
                homes[self.homes[call.key]] += 1
            self.waiting[self.homes[call.key]].append(call)
        self._hand_out()

    def poll(self, seconds: float, mine: Callable[[WorkKey], bool] = lambda key: True) -> list[Reply]:
        until = time.monotonic() + seconds
        while True:
            self._listen(0.0)
            told = [reply for reply in self.replies if mine(reply.key)]
            left = until - time.monotonic()
            if told or left <= 0 or not self._owes(mine):
                self.replies = deque(reply for reply in self.replies if not mine(reply.key))
                return told
            self._listen(left)

    def _owes(self, mine: Callable[[WorkKey], bool]) -> bool:
        """Whether a reply to somebody's call is to come."""
        given = (one.call for queue in self.given for one in queue)
        return any(mine(call.key) for call in (*given, *(c for queue in self.waiting for c in queue)))

    def end(self, keys: Iterable[WorkKey]) -> None:
        ended = set(keys)
        for key in ended & self.homes.keys():
            home = self.homes.pop(key)
            self.present[home].discard(key)
            self.over[home].append(key)
        self.replies = deque(reply for reply in self.replies if reply.key not in ended)
        self.waiting = [deque(call for call in queue if call.key not in ended) for queue in self.waiting]
        for queue in self.given:
            for place, given in enumerate(queue):
                if given.call.key in ended:
                    queue[place] = given._replace(is_wanted=False)
        self._hand_out()

    def take_events(self) -> list[Event]:
        told, self.events = self.events, []
        return told

    def close(self) -> None:
        while self.workers:
            self.workers.pop().end()

    def _listen(self, seconds: float) -> None:
        """Takes what the workers say within `seconds`, and what they fail to say within their deadlines."""
        for worker, answer, late in heard(self.workers, seconds):
            self._hear(self.workers.index(worker), answer, late)
        self._hand_out()

    def _hand_out(self) -> None:
        for i, worker in enumerate(self.workers):
            unread = self.unheard[i] + sum(given.is_first for given in self.given[i])
            if worker.ready and unread < AHEAD_MESSAGES:
                self._give(i, worker)

    def _give(self, i: int, worker: Worker) -> None:
        """One message for worker i: the episodes that have ended, and the calls that it has room for."""
        parts = [bytes(ForkingPickler.dumps(End(tuple(self.over[i]))))] if self.over[i] else []
        calls: list[Given] = []
        room = AHEAD_BYTES - sum(given.size for given in self.given[i])
        for call in self.waiting[i]:
            message = bytes(ForkingPickler.dumps(call))
            room -= len(message)
            if room < 0 and (self.given[i] or calls):
                break
            # An episode that must be played again may take its deadline for every turn.
            turns = 1 if call.key in self.present[i] else 1 + len(call.history)
            calls.append(Given(call, self.config.timeout_s * turns, len(message), not calls))
            parts.append(message)
        is_idle = not self.given[i]
        # It is told of ends with its next calls, or while it has nothing to do.
        if not calls and not (is_idle and parts):
            return
        try:
            worker.connection.send(parts)
        except OSError:
            # What it has said before it died is heard first, and says on which call it did.
            if is_idle:
                self._replace(i, worker.end(EXIT_S))
            return
        self.over[i].clear()
        self.unheard[i] += not calls
        for given in calls:
            self.waiting[i].popleft()
            self.present[i].add(given.call.key)
            self.given[i].append(given)
            worker.places.append(0)
        if is_idle and calls:
            self._begin_deadline(i)

    def _begin_deadline(self, i: int) -> None:
        """Worker i begins with the first of the calls that it has."""
        self.workers[i].deadline = time.monotonic() + self.given[i][0].seconds

    def _hear(self, i: int, answer: Answer | None, late: bool = False) -> None:
        worker = self.workers[i]
        if not worker.ready:
            # It was imported before: somebody has killed this one.
            is_killed = answer is None and not late and bool(self.facts)
            if is_killed and self.deaths < DEATHS_IN_A_ROW:
                self.deaths += 1
                self._replace(i, worker.end(EXIT_S))
            else:
                what = f"environment {self.config.factory or list(self.config.tools)}"
                self.facts, self.deaths = worker.started(answer, late, what), 0
            return
        if not self.given[i]:  # it died while it had nothing to do
            self._replace(i, worker.end(EXIT_S))
            return
        given = self.given[i].popleft()
        call, self.unheard[i] = given.call, 0
        worker.places.popleft()
        if self.given[i]:
            self._begin_deadline(i)
        if answer is None:
            ended = worker.end(0.0 if late else EXIT_S)
            self._replace(i, None if late else ended)
            what = f"took more than environment.timeout_s = {self.config.timeout_s:g} s" if late else ""
            if given.is_wanted:
                self._fail(call, "timeout" if late else "crash", what or f"ended its process ({ended})")
        elif not given.is_wanted:
            return
        elif answer.kind == "failed":
            self._fail(call, "error", f"raised {answer.value}", answer.traceback)
        elif answer.kind == "diverged":
            self.replies.append(Reply(call.key, is_diverged=True, why=str(answer.value)))
        else:
            self.failures = 0
            told = answer.value
            self.replies.append(
                Reply(call.key, told.observation, state=told.state, is_replayed=told.is_replayed)
            )

    def _fail(self, call: Call, failed: str, what: str, trace: str = "") -> None:
        self.failures += 1
        why = f"the environment of sample {call.key[1]} of group {call.key[0]} (prompt "
        why += f"{call.prompt.prompt_id}) {what}"
        if self.failures >= FAILURES_IN_A_ROW or self.config.failure_reward is None:
            error = EnvironmentFailure(f"{why}; environment.failure_reward states what it counts as")
            if self.failures >= FAILURES_IN_A_ROW:
                error.add_note(f"the {self.failures}th in a row: failure_reward is for a few of many")
            if trace:
                error.add_note(trace)
            raise error
        log.warning("%s: it counts as %g", why, self.config.failure_reward)
        self.replies.append(Reply(call.key, failed=failed, why=why))

    def _replace(self, i: int, ended: str | None) -> None:
        """Another process in place of worker i; its episodes are made again there when they go on.

        Calls that it had and has not begun come first there.
        """
        if ended is not None:
            self.events.append(Event("environment_death", f"environment-{i}", ended))
        self.workers[i].end()
        self.workers[i], self.present[i] = self._worker(), set()
        self.waiting[i].extendleft(given.call for given in reversed(self.given[i]) if given.is_wanted)
        self.given[i].clear()
        self.over[i].clear()
        self.unheard[i] = 0


def describe(
    config: EnvironmentConfig, form: str = "hermes", env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What an environment says of itself (`protocol.facts`), asked of a process that ends again.

    Raises ValueError when the environment cannot be imported, so that nothing heavy starts in vain.
    """
    pool = LocalEnvironmentPool(replace(config, workers=1), form, env)
    try:
        return pool.start()
    finally:
        pool.close()
