"""The rollout pool's protocol as the trainer sees it, the balancing of prompts, and the pool of one local engine."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gspo_dist.rollout.engine import EngineInfo, RolloutEngine, SyncReceipt
from gspo_dist.types import Completion, Prompt, SamplingSpec


class RolloutPool(Protocol):
    """Engines as one."""

    @property
    def engines(self) -> Mapping[str, Any]: ...

    def start(self) -> EngineInfo: ...

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]: ...

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]: ...

    def start_weight_update(self, timeout: float) -> None: ...

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]: ...

    def sleep(self) -> None: ...

    def wake_up(self, weights_only: bool = False) -> None: ...

    def peak_memory(self) -> dict[str, dict[str, int]]: ...

    def close(self) -> None: ...


def balance(prompt_lengths: Sequence[int], engines: int, spec: SamplingSpec) -> list[list[int]]:
    """rows[engine] = prompts it samples: the heaviest first to the least loaded, ties to the first.

    The work of a prompt is its prefill once and `n` completions of unknown length, taken at the limit: with equal
    prompts every engine gets as many groups. Depends on lengths alone, so that a run can be repeated exactly.
    """
    work = [length + spec.n * spec.max_tokens for length in prompt_lengths]
    heap = [(0, e) for e in range(engines)]
    rows: list[list[int]] = [[] for _ in range(engines)]
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, e = heapq.heappop(heap)
        rows[e].append(i)
        heapq.heappush(heap, (load + work[i], e))
    return [sorted(r) for r in rows]


class LocalRolloutPool:
    """One engine in this process."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    @property
    def engines(self) -> dict[str, RolloutEngine]:
        return {"engine-0": self.engine}

    def start(self) -> EngineInfo:
        return self.engine.info()

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        return self.engine.generate(prompts, spec, request_ids)

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]:
        return {"engine-0": self.engine.logprobs_of(sequences)}

    def start_weight_update(self, timeout: float) -> None:
        self.engine.start_weight_update()

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]:
        return {"engine-0": self.engine.finish_weight_update(policy_version)}

    def sleep(self) -> None:
        self.engine.sleep()

    def wake_up(self, weights_only: bool = False) -> None:
        self.engine.wake_up(weights_only)

    def peak_memory(self) -> dict[str, dict[str, int]]:
        import resource

        return {"process": {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}

    def close(self) -> None:
        self.engine.close()
