"""Reward workers on the nodes of a cluster: each is an actor with a reward process that it can end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from gspo_dist.actors.process import ActorProcess, Actors
from gspo_dist.config import RewardConfig
from gspo_dist.failures import Event, first_line
from gspo_dist.rewards.pool import DEATHS_IN_A_ROW, START_TIMEOUT_S, LocalRewardPool, bare
from gspo_dist.rewards.reward import Item, Judged, located

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""What a call may take beyond the deadlines of its rollouts: it travels, and the pool below counts to itself.
"""


class RewardWorker(ActorProcess):
    """Judges rollouts, a chunk per call, in a process below this one: the actor survives any reward."""

    def __init__(self, name: str, log_dir: str, config: RewardConfig) -> None:
        super().__init__(name, log_dir)
        self.pool = LocalRewardPool(replace(config, workers=1))

    def start(self) -> None:
        """Waits until the reward is imported. Raises ValueError when it cannot be."""
        self.pool.start()

    def judge(self, items: Sequence[Item]) -> tuple[list[Judged], list[Event]]:
        """The verdicts, and what became of the process below meanwhile."""
        return self.pool.judge(items), self.pool.take_events()


class RayRewardPool:
    """`gspo_dist.rewards.pool.RewardPool` over actors: spreads rollouts evenly over them.

    Deadlines, restarts and their rewards are those of LocalRewardPool. An actor that dies all the same, or
    answers nothing at all, is replaced, and its rollouts are judged again. ProcessDied or ProcessTimeout:
    DEATHS_IN_A_ROW died over one call.
    """

    def __init__(self, config: RewardConfig, log_dir: Path, env: Mapping[str, str] | None = None) -> None:
        """Creates the actors, which begin to import the reward, with `env` in their environment.

        Its file is found from this working directory.
        """
        self.config = located(config)
        self.events: list[Event] = []
        self.env = dict(env or {})
        self.closed = False
        self.actors = Actors({}, log_dir)
        for i in range(config.workers):
            self._create(f"reward-{i}")

    def _create(self, name: str) -> None:
        # Without a CPU of their own, as rewards run while the other actors wait.
        remote = ray.remote(RewardWorker).options(num_cpus=0, runtime_env={"env_vars": self.env})
        self.actors.handles[name] = remote.remote(name, str(self.actors.log_dir), self.config)

    def start(self) -> None:
        self.actors.call_all("start", timeout=START_TIMEOUT_S + GRACE_S)

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """The verdicts in order. Example: 5 items over 2 workers are chunks of 3 and 2."""
        handles = self.actors.handles
        size = max(1, -(-len(items) // len(handles)))
        light = [bare(item) for item in items]
        chunks = [light[i : i + size] for i in range(0, len(items), size)]
        # Fewer items than workers leave some of them without a chunk.
        waiting = dict(zip(handles, chunks, strict=False))
        # Each rollout may also cost the start of a new process.
        longest = (self.config.timeout_s + START_TIMEOUT_S) * size + GRACE_S
        told: dict[str, list[Judged]] = {name: [] for name in waiting}
        deaths = 0
        while waiting:
            refs = {name: handles[name].judge.remote(chunk) for name, chunk in waiting.items()}
            answers, failures = self.actors.each(refs, longest, deaths_only=True)
            for name, (verdicts, events) in answers.items():
                told[name] = verdicts
                self.events += events
                del waiting[name]
            for name, error in failures.items():
                deaths += 1
                if self.closed or deaths >= DEATHS_IN_A_ROW:
                    raise error
                self._bury(name, error)
        return [verdict for chunk in told.values() for verdict in chunk]

    def _bury(self, name: str, error: Exception) -> None:
        log.warning("%s is dead, another one judges its rollouts again: %s", name, error)
        self.events.append(Event("reward_death", name, first_line(error)))
        ray.kill(self.actors.handles[name])
        self._create(name)

    def take_events(self) -> list[Event]:
        told, self.events = self.events, []
        return told

    def close(self) -> None:
        self.closed = True
        self.actors.kill()
