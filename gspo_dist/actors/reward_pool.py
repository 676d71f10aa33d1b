"""Reward workers: rewards are computed in processes of their own, each rollout with a deadline."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from gspo_dist.actors.process import ActorProcess, Actors
from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import Item, Judged, judge_rollout, resolve_reward
from gspo_dist.types import Completion, Prompt

GRACE_S = 30.0


class _Late(BaseException):
    """The alarm of a deadline; not an Exception, so that a reward's own `except Exception` cannot swallow it."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Interrupts Python code after `seconds`. Ray runs an actor's methods in its main thread, where signals arrive."""

    def ring(signum: int, frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class RewardWorker(ActorProcess):
    """Judges rollouts, a chunk a call."""

    def __init__(self, name: str, log_dir: str, config: RewardConfig) -> None:
        super().__init__(name, log_dir)
        self.config = config
        self.function = resolve_reward(config)

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        return [self._judge(*item) for item in items]

    def _judge(self, rollout_id: int, prompt: Prompt, completion: Completion) -> Judged:
        try:
            with _deadline(self.config.timeout_s):
                return judge_rollout(self.function, prompt, completion, rollout_id)
        except _Late:
            if self.config.timeout_reward is None:
                raise TimeoutError(
                    f"the reward of rollout {rollout_id} (prompt {prompt.prompt_id}) took more than "
                    f"reward.timeout_s = {self.config.timeout_s:g} s; bound its work, raise the deadline, or set "
                    "reward.timeout_reward"
                ) from None
            return Judged(self.config.timeout_reward, {"timeout": 1.0})


class RayRewardPool:
    """Spreads rollouts evenly over the workers."""

    def __init__(self, config: RewardConfig, log_dir: Path) -> None:
        self.config = config
        names = [f"reward-{i}" for i in range(config.workers)]
        remote = ray.remote(RewardWorker)
        self.actors = Actors(
            {name: remote.options(num_cpus=0).remote(name, str(log_dir), config) for name in names}, log_dir
        )

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """(reward, parts) of every item, in order; a reward sees no routing trace. A rollout over the deadline gets
        `timeout_reward` and the part `timeout` = 1. Raises what the reward function raised (naming the rollout), or
        ProcessTimeout when code that no signal interrupts holds a worker past the sum of its deadlines."""
        names = list(self.actors.handles)
        size = max(1, -(-len(items) // len(names)))
        judged = [(i, prompt, replace(completion, routing=None)) for i, prompt, completion in items]
        chunks = [judged[i : i + size] for i in range(0, len(items), size)]
        refs = {
            name: self.actors.handles[name].judge.remote(c) for name, c in zip(names, chunks, strict=False)
        }
        answers = self.actors.gather(refs, self.config.timeout_s * size + GRACE_S)
        return [verdict for chunk in answers.values() for verdict in chunk]

    def close(self) -> None:
        self.actors.kill()
