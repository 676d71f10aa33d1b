"""Judging the rollouts of a run: the protocol, and the pool that runs rewards in processes of this host.

A deadline must lie outside the process that it bounds. A reward may set or cancel alarms, hang in C code,
call exit or crash. So the parent holds the clock, kills the process, starts another one and goes on with the
next rollout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Pipe, wait
from typing import Any, Protocol

from gspo_dist.config import RewardConfig
from gspo_dist.failures import Event
from gspo_dist.rewards.reward import Item, Judged, RewardError, describe, located
from gspo_dist.rewards.worker import Answer

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Longest wait for a worker to import its reward: on a busy host, or from a slow network file system."""
EXIT_S = 1.0
"""What a process that has closed its connection may take to end, before it is killed."""
CHUNK = 32
"""Most items per message to a worker."""
DEATHS_IN_A_ROW = 5
"""So many rollouts in a row that end a worker's process are the reward's fault, not the completions'."""
ERRORS_IN_A_ROW = 100
"""So many rollouts in a row whose reward raised are a service that is gone, or a reward that is broken."""
BOOTSTRAP = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[4]).main(int(sys.argv[2]), int(sys.argv[3]))"
)


class RewardPool(Protocol):
    """Whatever judges the rollouts of a run."""

    def start(self) -> None:
        """Waits until every worker has imported the reward. A second call does nothing.

        Raises ValueError when the reward cannot be imported, so that nothing heavy starts in vain.
        """
        ...

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """The verdict on every item, in order. May be called any number of times.

        A rollout whose reward misses the deadline gets `reward.timeout_reward` and the part `timeout` = 1.
        One whose process ends is judged again by another. Where that ends too, it gets the same reward and
        the part `crash` = 1. One whose reward raises or gives no finite number gets `reward.error_reward` and
        the part `error` = 1. Raises RewardError, naming the rollout, where the config states none of these.
        """
        ...

    def take_events(self) -> list[Event]:
        """Deaths of reward processes since the last call."""
        ...

    def close(self) -> None:
        """Ends what the pool started. A second call does nothing."""
        ...


class Worker:
    """One process that answers, as its parent sees it: a reward's, or an environment's."""

    def __init__(
        self, config: Any, module: str = "gspo_dist.rewards.worker", env: Mapping[str, str] | None = None
    ) -> None:
        """Starts the process, which begins to import the reward.

        module: whose `main` it runs. That is given `config` first. env: variables beside this process's own.
        """
        self.connection, theirs = Pipe()
        with theirs:
            arguments = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid()), module]
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | (env or {}),
                start_new_session=True,  # a group of its own: a kill reaches all that a reward has started
            )
        self.connection.send(config)
        self.ready = False
        self.places: deque[int] = deque()
        """Places of the items that it was given and has not judged. It works on the first."""
        self.deadline = time.monotonic() + START_TIMEOUT_S

    @property
    def awaited(self) -> bool:
        """Whether it owes an answer: it is starting, or judging."""
        return not self.ready or bool(self.places)

    def give(self, places: Sequence[int], items: Any, seconds: float) -> bool:
        """Has it judge items, each within `seconds` of the one before. False when the process is gone."""
        try:
            self.connection.send(items)
        except OSError:
            return False
        self.places, self.deadline = deque(places), time.monotonic() + seconds
        return True

    def answers(self) -> Iterator[Answer | None]:
        """What it has said up to now. None at the end: it has died."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):
            yield None

    def started(self, answer: Answer | None, late: bool, what: str) -> Any:
        """Takes its first answer, and returns what it says of what it has imported.

        what: it imports, in words. ValueError: it could not, or has not within START_TIMEOUT_S.
        """
        where = f"the process of {what}"
        if late:
            raise ValueError(f"{where} must import it within {START_TIMEOUT_S:.0f} s: it has not answered")
        if answer is None:
            raise ValueError(f"{where} ended ({self.end(EXIT_S)}) while it imported it; see its output above")
        if answer.kind == "refused":
            raise ValueError(answer.value)
        self.ready = True
        return answer.value

    def end(self, grace_s: float = 0.0) -> str:
        """Kills it and all that it started. Returns how it ended, in words. A second call says the same.

        grace_s: the time that it has to end by itself, so that it can be told how it died.
        """
        if self.process.returncode is None:
            until, watched = time.monotonic() + grace_s, os.WEXITED | os.WNOWAIT | os.WNOHANG
            while not os.waitid(os.P_PID, self.process.pid, watched) and time.monotonic() < until:
                time.sleep(0.01)
            # Killed before it is reaped, so that its id cannot belong to another process yet. One that has
            # ended keeps its own status.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.connection.close()
        status = self.process.returncode
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def heard(
    workers: Iterable[Worker], seconds: float = math.inf
) -> Iterator[tuple[Worker, Answer | None, bool]]:
    """What workers say within `seconds`, and what they fail to say: (worker, answer, whether it is late).

    An answer of None is the last of its worker, which has died or is late. The wait ends with the first
    answer, and at the soonest deadline at the latest. Where no worker owes an answer there is none.
    """
    awaited = [worker for worker in workers if worker.awaited]
    if not awaited:
        return
    soonest = min(worker.deadline for worker in awaited) - time.monotonic()
    talking = wait([worker.connection for worker in awaited], max(0.0, min(seconds, soonest)))
    for worker in awaited:
        if worker.connection in talking:
            for answer in worker.answers():
                yield worker, answer, False
        elif time.monotonic() >= worker.deadline:
            yield worker, None, True


class LocalRewardPool:
    """Judges rollouts in `reward.workers` processes of this host, one rollout per process at a time."""

    def __init__(self, config: RewardConfig, env: Mapping[str, str] | None = None) -> None:
        """Starts the processes, with `env` in their environment; `start` waits for them.

        A reward file is found from this working directory.
        """
        self.config, self.env = located(config), dict(env or {})
        self.workers = [self._worker() for _ in range(config.workers)]
        self.deaths = 0
        """Rollouts in a row that ended their process."""
        self.errors = 0
        """Rollouts in a row whose reward raised."""
        self.again: set[int] = set()
        """Places of the items whose process ended once."""
        self.has_started = False
        """Whether the reward was imported before: then a process that ends while it imports was killed."""
        self.events: list[Event] = []

    def _worker(self) -> Worker:
        return Worker(self.config, env=self.env)

    def start(self) -> None:
        self._run([])

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        return self._run(items) if items else []

    def take_events(self) -> list[Event]:
        told, self.events = self.events, []
        return told

    def close(self) -> None:
        while self.workers:
            self.workers.pop().end()

    def _run(self, items: Sequence[Item]) -> list[Judged]:
        """Judges the items. Without any, it waits for the workers that are starting."""
        waiting, verdicts = deque(range(len(items))), dict[int, Judged]()
        self.again = set()
        while len(self.workers) < self.config.workers:  # an earlier call failed, and has ended them
            self.workers.append(self._worker())
        try:
            while len(verdicts) < len(items) or (not items and not all(w.ready for w in self.workers)):
                self._hand_out(items, waiting)
                for worker, answer, late in heard(self.workers):
                    self._hear(worker, answer, items, verdicts, late)
                    if answer is None:  # it was ended: what it had not begun goes to the others
                        waiting.extendleft(reversed(worker.places))
        except BaseException:
            self.close()  # answers to this call must not be taken for answers to the next one
            raise
        return [verdicts[place] for place in range(len(items))]

    def _hand_out(self, items: Sequence[Item], waiting: deque[int]) -> None:
        """Gives every idle worker the next items."""
        for worker in self.workers:
            if waiting and not worker.awaited:
                # Half of an even share at a time: fast rewards need few messages, slow ones are still spread.
                count = max(1, min(CHUNK, len(waiting) // (2 * len(self.workers))))
                places = [waiting.popleft() for _ in range(count)]
                if not worker.give(places, [bare(items[place]) for place in places], self.config.timeout_s):
                    waiting.extendleft(reversed(places))
                    self._replace_idle(worker)

    def _hear(
        self,
        worker: Worker,
        answer: Answer | None,
        items: Sequence[Item],
        verdicts: dict[int, Judged],
        late: bool = False,
    ) -> None:
        """Takes a worker's answer, or the news that it has none: it is late, or dead."""
        if not worker.ready:
            if answer is None and not late and self.has_started:
                self._replace_idle(worker)
            else:
                worker.started(answer, late, f"reward.function {self.config.function!r}")
                self.has_started = True
            return
        if not worker.places:  # it died after its last verdict, before anybody gave it more
            self._replace_idle(worker)
            return
        rollout_id, prompt, _ = items[worker.places[0]]
        if answer is None:
            if late or worker.places[0] in self.again:
                verdicts[worker.places.popleft()] = self._unjudged(worker, describe(rollout_id, prompt), late)
            else:  # it may have been killed from outside: somebody else judges it once more
                self.again.add(worker.places[0])
                ended = worker.end(EXIT_S)
                log.warning(
                    "%s ended its process (%s): it is judged again", describe(rollout_id, prompt), ended
                )
                self._note(ended)
            self._replace(worker)
        elif answer.kind == "failed":
            verdicts[worker.places.popleft()] = self._failed(answer)
            worker.deadline = time.monotonic() + self.config.timeout_s
        else:
            verdicts[worker.places.popleft()] = answer.value
            worker.deadline, self.deaths = time.monotonic() + self.config.timeout_s, 0
            self.errors = 0

    def _failed(self, answer: Answer) -> Judged:
        """The stated reward of a rollout whose reward raised. Raises RewardError where none is stated."""
        self.errors += 1
        error = RewardError(answer.value)
        error.add_note(answer.traceback)
        if self.config.error_reward is None:
            raise error
        if self.errors >= ERRORS_IN_A_ROW:
            error.add_note(f"the {self.errors}th in a row: reward.error_reward is for a few of many")
            raise error
        log.warning("%s: it counts as %g", answer.value, self.config.error_reward)
        return Judged(self.config.error_reward, {"error": 1.0})

    def _unjudged(self, worker: Worker, who: str, late: bool) -> Judged:
        """The stated reward of a rollout whose reward gave none. Raises RewardError where none is stated."""
        ended = worker.end(0.0 if late else EXIT_S)
        if late:
            what = f"took more than reward.timeout_s = {self.config.timeout_s:g} s"
            way_out = "bound its work, raise the deadline"
        else:
            what = f"ended its process ({ended})"
            way_out = "bound its work, raise an exception instead of ending the process"
            self._note(ended)
            self.deaths += 1
            if self.deaths >= DEATHS_IN_A_ROW:
                raise RewardError(f"{who} {what}, the {self.deaths}th in a row; {way_out}")
        if self.config.timeout_reward is None:
            raise RewardError(f"{who} {what}; {way_out}, or set reward.timeout_reward")
        log.warning("%s %s: it counts as %g", who, what, self.config.timeout_reward)
        return Judged(self.config.timeout_reward, {"timeout" if late else "crash": 1.0})

    def _replace_idle(self, worker: Worker) -> None:
        """A process that died while it had nothing to judge costs no rollout, but somebody should know."""
        ended = worker.end(EXIT_S)
        log.warning(
            "a process of reward.function %r ended (%s) while it had nothing to judge: another one starts",
            self.config.function,
            ended,
        )
        self._note(ended)
        self._replace(worker)

    def _note(self, ended: str) -> None:
        self.events.append(Event("reward_death", f"a process of {self.config.function}", ended))

    def _replace(self, worker: Worker) -> None:
        worker.end()
        self.workers[self.workers.index(worker)] = self._worker()


def bare(item: Item) -> Item:
    """Without expert choices and candidates: they are most of a rollout's bytes, and no reward reads them."""
    rollout_id, prompt, completion = item
    if completion.routing is None and completion.candidates is None:
        return item
    return rollout_id, prompt, replace(completion, routing=None, candidates=None)
