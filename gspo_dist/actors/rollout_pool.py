"""The rollout pool: one actor an engine, prompts spread evenly by the work they are expected to be."""

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

EngineFactory = Callable[..., RolloutEngine]
"""make(name=) -> RolloutEngine; picklable; imports its engine when called."""


class EngineProcess(ActorProcess):
    """One engine's process."""

    engine: RolloutEngine

    def start(self, make: EngineFactory) -> EngineInfo:
        self.engine = make(name=self.name)
        return self.engine.info()

    def info(self) -> EngineInfo:
        return self.engine.info()

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        return self.engine.generate(prompts, spec, request_ids)

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.engine.logprobs_of(sequences)

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


class RayRolloutPool:
    """All engines as one."""

    def __init__(
        self, config: RolloutConfig, make: EngineFactory, options: Sequence[Mapping[str, Any]], log_dir: Path
    ) -> None:
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
        """Waits until every engine is up (they start when the pool is made, beside the learner)."""
        return next(
            iter(self.actors.gather(self.starting, max(START_TIMEOUT_S, self.config.timeout_s)).values())
        )

    @property
    def engines(self) -> dict[str, Any]:
        return self.actors.handles

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """`spec.n` completions a prompt, in order. The assignment depends on the prompts alone, so a run repeats."""
        names = list(self.actors.handles)
        refs, places = {}, {}
        for name, rows in zip(
            names, balance([len(p.token_ids) for p in prompts], len(names), spec), strict=True
        ):
            if rows:
                places[name] = rows
                refs[name] = self.actors.handles[name].generate.remote(
                    [prompts[i] for i in rows], spec, [request_ids[i] for i in rows]
                )
        out: list[list[Completion]] = [[] for _ in prompts]
        for name, groups in self.actors.gather(refs, self.config.timeout_s).items():
            for i, group in zip(places[name], groups, strict=True):
                out[i] = group
        return out

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
        self.actors.kill()
