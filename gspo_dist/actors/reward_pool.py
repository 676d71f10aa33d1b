"""Reward workers on the nodes of a cluster: each is an actor with a reward process that it can end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from gspo_dist.actors.process import ActorProcess, Actors
from gspo_dist.config import RewardConfig
from gspo_dist.rewards.pool import START_TIMEOUT_S, LocalRewardPool, bare
from gspo_dist.rewards.reward import Item, Judged, located

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

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        return self.pool.judge(items)


class RayRewardPool:
    """`gspo_dist.rewards.pool.RewardPool` over actors: spreads rollouts evenly over them.

    Deadlines, restarts and their rewards are those of LocalRewardPool. An actor that dies all the same, or
    answers nothing at all, raises ProcessDied or ProcessTimeout.
    """

    def __init__(self, config: RewardConfig, log_dir: Path, env: Mapping[str, str] | None = None) -> None:
        """Creates the actors, which begin to import the reward, with `env` in their environment.

        Its file is found from this working directory.
        """
        self.config = located(config)
        remote = ray.remote(RewardWorker)
        self.actors = Actors(
            {
                # Without a CPU of their own, as rewards run while the other actors wait.
                f"reward-{i}": remote.options(num_cpus=0, runtime_env={"env_vars": dict(env or {})}).remote(
                    f"reward-{i}", str(log_dir), self.config
                )
                for i in range(config.workers)
            },
            log_dir,
        )

    def start(self) -> None:
        self.actors.call_all("start", timeout=START_TIMEOUT_S + GRACE_S)

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """The verdicts in order. Example: 5 items over 2 workers are chunks of 3 and 2."""
        handles = self.actors.handles
        size = max(1, -(-len(items) // len(handles)))
        light = [bare(item) for item in items]
        chunks = [light[i : i + size] for i in range(0, len(items), size)]
        # Fewer items than workers leave some of them without a chunk.
        refs = {name: handles[name].judge.remote(chunk) for name, chunk in zip(handles, chunks, strict=False)}
        # Each rollout may also cost the start of a new process.
        longest = (self.config.timeout_s + START_TIMEOUT_S) * size + GRACE_S
        answers = self.actors.gather(refs, longest)
        return [verdict for chunk in answers.values() for verdict in chunk]

    def close(self) -> None:
        self.actors.kill()
