"""The rollout pool: one actor per engine. The books of who samples what are rollout/fleet.py's."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from gspo_dist.actors.process import ASK_S, ActorProcess, Actors
from gspo_dist.config import RolloutConfig
from gspo_dist.host import Place
from gspo_dist.rollout.engine import EngineInfo, Progress, RolloutEngine, SyncReceipt
from gspo_dist.rollout.fleet import Answers, Fleet
from gspo_dist.types import Work

log = logging.getLogger(__name__)

START_TIMEOUT_S = 900.0
"""vLLM reads the weights, measures memory and may compile before an engine answers for the first time."""

CLOSE_S = 15.0
"""Longest wait for engines to close. One that is asked ends its workers in order and leaves the learner."""
SUCCESSORS = 3
"""So many processes in a row may die in an engine's place before they took part in a publication."""

EngineFactory = Callable[..., RolloutEngine]
"""make(name=) -> RolloutEngine. It can be pickled, and imports its engine when called."""


class EngineProcess(ActorProcess):
    """One engine's process: builds the engine in place and forwards the verbs of `RolloutEngine` to it."""

    def __init__(self, name: str, log_dir: str) -> None:
        super().__init__(name, log_dir)
        self._engine: RolloutEngine | None = None

    @property
    def engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError(f"{self.name} has no engine yet: call start first")
        return self._engine

    def start(self, make: EngineFactory, gpus: Sequence[str] = (), asleep: bool = False) -> EngineInfo:
        """Builds the engine. Called once, before every other verb.

        asleep: frees the device memory again once it is up.
        gpus: ids of the host's GPUs that it takes instead of what Ray gave it. Ray gives an actor parts of
        one GPU or several whole ones, and a colocated engine shares several.
        """
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # read when CUDA starts, which make() does
        self._engine = make(name=self.name)
        info = self._engine.info()
        if asleep:
            self._engine.sleep()
        return info

    def info(self) -> EngineInfo:
        return self.engine.info()

    def submit(self, work: Sequence[Work]) -> None:
        self.engine.submit(work)

    def advance(self, ticks: int | None, seconds: float | None) -> Progress:
        return self.engine.advance(ticks, seconds)

    def withdraw(self) -> list[Work]:
        return self.engine.withdraw()

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.engine.logprobs_of(sequences)

    def sees(self, path: str, content: str) -> bool:
        """Whether the file at `path` holds `content` here: then this process shares the asker's memory."""
        try:
            return Path(path).read_text() == content
        except OSError:
            return False

    def init_weight_sync(self, info: Mapping[str, Any]) -> None:
        self.engine.init_weight_sync(info)

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, info: Mapping[str, Any]) -> None:
        self.engine.update_weights(info)

    def abandon_weight_update(self) -> None:
        self.engine.abandon_weight_update()

    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        return self.engine.finish_weight_update(policy_version)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake_up(self, weights_only: bool = False) -> None:
        self.engine.wake_up(weights_only)

    def close(self) -> None:
        """Ends the engine in order: vLLM's workers, their message queues, the weight sync's connection."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


class RayRolloutPool(Fleet):
    """All engines as one: `gspo_dist.rollout.pool.RolloutPool` over actors.

    An engine that dies, breaks or misses its deadline is ended, and its work goes to the others. Every verb
    raises what an engine refuses, with the engine's name.

    Engines that sleep share their GPUs with the learner. Their successors start only while the engines have
    the GPUs, come up asleep, and wake for their first publication.
    """

    def __init__(
        self,
        config: RolloutConfig,
        make: EngineFactory,
        options: Sequence[Mapping[str, Any]],
        log_dir: Path,
        gpus: Sequence[Sequence[str]] = (),
    ) -> None:
        """Creates the actors, which begin to build their engines. options: Ray's, one mapping per engine.

        gpus: those of each engine, where Ray's options do not say which (`EngineProcess.start`).
        """
        names = [f"engine-{i}" for i in range(config.engines)]
        self.gpus = dict(zip(names, gpus, strict=False))
        super().__init__(names, config.timeout_s)
        self.config, self.make = config, make
        self.options = dict(zip(names, options, strict=True))
        self.actors = Actors({}, log_dir)
        self.starting: dict[str, Any] = {}
        """Engines that are coming up -> the answer that they will give."""
        self.attempts = dict.fromkeys(names, 0)
        """Successors of each engine that died before they took part in a publication."""
        self.shares = False
        """Whether engines sleep at times, so that somebody else has their GPUs then."""
        self.away = False
        """Whether somebody else has the GPUs now."""
        self.postponed: list[str] = []
        """Engines whose successors wait for the GPUs."""
        for name in names:
            self._create(name)

    def _create(self, name: str) -> None:
        """Creates the actor and has it build its engine. Nobody waits for it here."""
        remote = ray.remote(EngineProcess)
        handle = remote.options(**self.options[name]).remote(name, str(self.actors.log_dir))
        self.actors.handles[name] = handle
        self.starting[name] = handle.start.remote(self.make, self.gpus.get(name, ()), self.shares)

    def start(self) -> EngineInfo:
        """Waits until every engine is up, and returns what the first one says of itself: they are alike.

        The engines start when the pool is made, so that they load while the learner does.
        """
        infos = self.actors.gather(self.starting, max(START_TIMEOUT_S, self.config.timeout_s))
        self.starting = {}
        return next(iter(infos.values()))

    @property
    def engines(self) -> dict[str, Any]:
        """Name -> actor handle of those alive. The learner's exporters deliver weights to them."""
        return {name: self.actors.handles[name] for name in self.alive}

    def each(self, method: str, arguments: Mapping[str, tuple[Any, ...]], timeout: float) -> Answers:
        refs = {
            name: getattr(self.actors.handles[name], method).remote(*own) for name, own in arguments.items()
        }
        return self.actors.each(refs, timeout)

    def bury(self, name: str, error: Exception) -> None:
        log.warning("%s is dead, the others go on with its work: %s", name, error)
        self._replace(name)

    def _replace(self, name: str) -> None:
        """Ends what is left of an engine and starts a successor, unless the last ones came to nothing."""
        ray.kill(self.actors.handles[name])  # what hangs, or broke without ending, must not keep its GPU
        self.attempts[name] += 1
        if self.attempts[name] > SUCCESSORS:
            log.error("%s is given up: %d successors in a row died before a publication", name, SUCCESSORS)
            return
        if self.away:
            self.postponed.append(name)
        else:
            self._create(name)

    def newcomers(self, *, wait: bool) -> list[str]:
        came: list[str] = []
        deadline = time.monotonic() + (max(START_TIMEOUT_S, self.config.timeout_s) if wait else 0.0)
        while self.starting and not came:
            names = {ref: name for name, ref in self.starting.items()}
            done, _ = ray.wait(
                list(names),
                num_returns=len(names) if not wait else 1,
                timeout=max(0.0, deadline - time.monotonic()),
            )
            if not done:
                break
            refs = {names[ref]: self.starting.pop(names[ref]) for ref in done}
            answers, failures = self.actors.each(refs, self.config.timeout_s)  # they are there already
            if self.shares:  # what a publication needs: the others have woken for it already
                woken = {name: self.actors.handles[name].wake_up.remote(True) for name in answers}
                answers, lost = self.actors.each(woken, self.config.timeout_s)
                failures |= lost
            came += answers
            for name, error in failures.items():
                log.warning("the successor of %s did not come up: %s", name, error)
                self._replace(name)
        return came

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]:
        """Log-probs of the same sequences from every engine: each holds weights of its own to be probed."""
        return self.ask("logprobs_of", list(sequences), timeout=timeout)

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]:
        receipts = self.ask("finish_weight_update", policy_version, timeout=timeout)
        self.attempts |= dict.fromkeys(receipts, 0)
        return receipts

    def sleep(self) -> None:
        """Returns when nothing of an engine needs its GPU, a successor that is starting included."""
        self.shares = self.away = True
        self._await_successors()
        _, failures = self.each("sleep", dict.fromkeys(self.alive, ()), self.config.timeout_s)
        self.lose(failures)

    def _await_successors(self) -> None:
        """Waits until those that are starting sleep. One that takes too long is ended and begins anew."""
        names = {ref: name for name, ref in self.starting.items()}
        if not names:
            return
        limit = max(START_TIMEOUT_S, self.config.timeout_s)
        _, late = ray.wait(list(names), num_returns=len(names), timeout=limit)
        for name in (names[ref] for ref in late):
            log.warning("the successor of %s did not come up within %.0f s", name, limit)
            del self.starting[name]
            self._replace(name)

    def wake_up(self, weights_only: bool = False) -> None:
        _, failures = self.each("wake_up", dict.fromkeys(self.alive, (weights_only,)), self.config.timeout_s)
        self.lose(failures)
        if not weights_only:
            self.away = False
            postponed, self.postponed = self.postponed, []
            for name in postponed:
                self._create(name)

    def places(self) -> dict[str, Place]:
        """Where each engine runs."""
        return self.ask("place", timeout=ASK_S)

    def peak_memory(self) -> dict[str, dict[str, int]]:
        return self.ask("peak_memory", timeout=ASK_S)

    def close(self) -> None:
        """Asks every engine to close, then kills it. One that is busy or dead is waited for no longer."""
        self.actors.ask_to_close(CLOSE_S)
        self.actors.kill()
