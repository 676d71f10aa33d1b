"""The rollout pool: one actor per engine, with prompts spread evenly by the work that they may become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from gspo_dist.actors.process import ActorProcess, Actors
from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.engine import EngineInfo, RolloutEngine, SyncReceipt
from gspo_dist.rollout.pool import balance
from gspo_dist.types import Completion, Prompt, SamplingSpec

START_TIMEOUT_S = 900.0
"""vLLM reads the weights, measures memory and may compile before an engine answers for the first time."""

CLOSE_S = 15.0
"""Longest wait for engines to close. One that is asked ends its workers in order and leaves the learner."""

EngineFactory = Callable[..., RolloutEngine]
"""make(name=) -> RolloutEngine; picklable; imports its engine when called."""


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

    def start(self, make: EngineFactory) -> EngineInfo:
        """Builds the engine; called once, before every other verb."""
        self._engine = make(name=self.name)
        return self._engine.info()

    def info(self) -> EngineInfo:
        return self.engine.info()

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        return self.engine.generate(prompts, spec, request_ids)

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


class RayRolloutPool:
    """All engines as one: `gspo_dist.rollout.pool.RolloutPool` over actors.

    Every verb waits for all engines that it asks. It raises ProcessDied or ProcessTimeout, naming the engine,
    or what an engine raised.
    """

    def __init__(
        self, config: RolloutConfig, make: EngineFactory, options: Sequence[Mapping[str, Any]], log_dir: Path
    ) -> None:
        """Creates the actors, which begin to build their engines. options: Ray's, one mapping per engine."""
        self.config = config
        remote = ray.remote(EngineProcess)
        self.actors = Actors(
            {
                f"engine-{i}": remote.options(**options[i]).remote(f"engine-{i}", str(log_dir))
                for i in range(config.engines)
            },
            log_dir,
        )
        self.starting = {name: handle.start.remote(make) for name, handle in self.actors.handles.items()}

    def start(self) -> EngineInfo:
        """Waits until every engine is up, and returns what the first one says of itself: they are alike.

        The engines start when the pool is made, so that they load while the learner does.
        """
        infos = self.actors.gather(self.starting, max(START_TIMEOUT_S, self.config.timeout_s))
        return next(iter(infos.values()))

    @property
    def engines(self) -> dict[str, Any]:
        """Name -> actor handle; the learner's exporter delivers weights to them itself."""
        return self.actors.handles

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """`spec.n` completions per prompt, in the order of the prompts.

        The assignment depends on the prompts alone, so a run can be repeated exactly. Example: two engines
        and prompts of 9, 3 and 3 tokens (n = 1, 4 tokens each): engine-0 samples prompt 0, engine-1 prompts 1
        and 2, and the three groups come back in the order 0, 1, 2.
        """
        names = list(self.actors.handles)
        refs, places = {}, {}
        rows_of = balance([len(prompt.token_ids) for prompt in prompts], len(names), spec)
        for name, rows in zip(names, rows_of, strict=True):
            if rows:  # fewer prompts than engines leave some without work
                places[name] = rows
                refs[name] = self.actors.handles[name].generate.remote(
                    [prompts[i] for i in rows], spec, [request_ids[i] for i in rows]
                )
        completions: list[list[Completion]] = [[] for _ in prompts]
        for name, groups in self.actors.gather(refs, self.config.timeout_s).items():
            for i, group in zip(places[name], groups, strict=True):
                completions[i] = group
        return completions

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]:
        """Log-probs of the same sequences from every engine: each holds weights of its own to be probed."""
        return self.actors.call_all("logprobs_of", list(sequences), timeout=timeout)

    def start_weight_update(self, timeout: float) -> None:
        self.actors.call_all("start_weight_update", timeout=timeout)

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]:
        return self.actors.call_all("finish_weight_update", policy_version, timeout=timeout)

    def sleep(self) -> None:
        self.actors.call_all("sleep", timeout=self.config.timeout_s)

    def wake_up(self, weights_only: bool = False) -> None:
        self.actors.call_all("wake_up", weights_only, timeout=self.config.timeout_s)

    def peak_memory(self) -> dict[str, dict[str, int]]:
        return self.actors.peak_memory()

    def close(self) -> None:
        """Asks every engine to close, then kills it. One that is busy or dead is waited for no longer."""
        self.actors.ask_to_close(CLOSE_S)
        self.actors.kill()
