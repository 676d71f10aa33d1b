"""The rollout pool's protocol as the trainer sees it, the balancing of prompts, and the pool of
one local engine.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gspo_dist.partition import longest_first
from gspo_dist.rollout.engine import EngineInfo, RolloutEngine, SyncReceipt
from gspo_dist.types import Completion, Prompt, SamplingSpec


class RolloutPool(Protocol):
    """All engines as one. A verb reaches every engine and returns when all have answered.

    Every verb raises what an engine raises, with the engine's name. Where engines are processes, it also
    raises when one has died or does not answer in time.
    """

    @property
    def engines(self) -> Mapping[str, Any]:
        """Name -> what a learner delivers weights to: an engine, or its Ray actor."""
        ...

    def start(self) -> EngineInfo:
        """Waits until every engine is up and returns the facts of the first; the others are
        alike. Called once.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """`RolloutEngine.generate` with the prompts spread over the engines by `balance`; answers
        in their order.
        """
        ...

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]:
        """Engine name -> log-probs of the same sequences, because each holds weights of its own.
        May be repeated.

        timeout: seconds to wait for the slowest engine.
        """
        ...

    def start_weight_update(self, timeout: float) -> None:
        """Opens a publication on every engine. WeightSyncError: one is open already."""
        ...

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]:
        """Closes the publication; engine name -> what arrived there. WeightSyncError: none is open, or
        it broke off.
        """
        ...

    def sleep(self) -> None:
        """Frees the engines' device memory. Sleeping twice is allowed. ValueError: they were not
        started for it.
        """
        ...

    def wake_up(self, weights_only: bool = False) -> None:
        """Takes back the memory that still sleeps, or that of the weights alone. Waking twice is allowed.

        ValueError: the engines were not started for it.
        """
        ...

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """Process -> {"host": bytes, and on GPUs "gpu": bytes}: the most that it has held so far."""
        ...

    def close(self) -> None:
        """Ends every engine. Called once, last."""
        ...


def balance(prompt_lengths: Sequence[int], engines: int, spec: SamplingSpec) -> list[list[int]]:
    """rows[engine] = the prompts that it samples, in their order: the heaviest first, each to
    the least loaded.

    The work of a prompt is its prefill, once, and `n` completions of unknown length, each taken at the
    limit. So with equal prompts every engine gets as many groups. It depends on lengths alone, so a run can
    be repeated exactly.

    Example: lengths [10, 40, 20] with n=1 and max_tokens=100 on two engines are works of 110, 140 and 120.
    Engine 0 gets the prompt of 140, engine 1 those of 120 and 110: [[1], [0, 2]].
    """
    work = [length + spec.n * spec.max_tokens for length in prompt_lengths]
    rows = longest_first(work, engines)
    assert rows is not None  # only a capacity can make it None
    return [sorted(row) for row in rows]


class LocalRolloutPool:
    """Implements `RolloutPool` with one engine in this process; a call cannot be ended, so
    timeouts do nothing.
    """

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
        # Linux counts the peak in KiB.
        return {"process": {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}

    def close(self) -> None:
        self.engine.close()
