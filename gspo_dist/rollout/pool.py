"""The rollout pool's protocol as the trainer sees it, the dealing of work, the pool of one local engine."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gspo_dist.failures import Event
from gspo_dist.partition import longest_first
from gspo_dist.rollout.engine import EngineInfo, Progress, RolloutEngine, SyncReceipt
from gspo_dist.types import Completion, Prompt, SamplingSpec, Work


class NoEngineLeft(RuntimeError):
    """Every engine is dead; the message says how each ended. What was in the making can be withdrawn."""


class RolloutPool(Protocol):
    """All engines as one. A verb reaches every engine and returns when all have answered.

    Every verb raises what an engine raises, with the engine's name. Where engines are processes, it also
    raises when one has died or does not answer in time.
    """

    runs_beside: bool
    """Whether the engines work while this process waits for a learner."""

    events: list[Event]
    """Deaths and returns of engines that nobody has taken yet."""

    @property
    def engines(self) -> Mapping[str, Any]:
        """Name -> what a learner delivers weights to: an engine, or its Ray actor."""
        ...

    def start(self) -> EngineInfo:
        """Waits until every engine is up. Returns the facts of the first, as all are alike. Called once."""
        ...

    def submit(self, work: Sequence[Work]) -> None:
        """`RolloutEngine.submit`, with the work dealt over the engines by `deal`.

        NoEngineLeft: none is alive. `withdraw` gives the work back.
        """
        ...

    def advance(
        self, ticks: int | Mapping[str, int] | None = None, seconds: float | None = None
    ) -> dict[str, Progress]:
        """`RolloutEngine.advance` of the engines side by side: name -> what it did. Idle ones may be missing.

        ticks: the same for all, or engine name -> its own. The work of an engine that dies goes to the
        others, as it was last reported. NoEngineLeft: none is alive. `withdraw` gives the work back.
        """
        ...

    def withdraw(self) -> list[Work]:
        """Takes out everything unfinished, in the order of its keys. Nothing is left in the engines."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """`RolloutEngine.generate` over all engines. The answers are in the order of the prompts."""
        ...

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]:
        """Engine name -> log-probs of the same sequences, because each holds weights of its own.

        timeout: seconds to wait for the slowest engine. It may be called again.
        """
        ...

    def start_weight_update(self, timeout: float) -> None:
        """Opens a publication on every engine. WeightSyncError: one is open already. NoEngineLeft: none is
        alive, and none is coming.
        """
        ...

    def abandon_update(self) -> bool:
        """After a failed publication: brings the engines that live out of it, ready for another.

        Whether an engine's death was the reason, so that another attempt may succeed.
        """
        ...

    def finish_weight_update(self, policy_version: int, timeout: float) -> dict[str, SyncReceipt]:
        """Closes the publication. Returns engine name -> what arrived there.

        WeightSyncError: none is open, or it broke off.
        """
        ...

    def sleep(self) -> None:
        """Frees the engines' device memory. Sleeping twice is allowed, and so is a pool without an engine
        left, whose learner saves a checkpoint then. Who starts in a dead engine's place is waited for.

        ValueError: the engines were not started for it.
        """
        ...

    def wake_up(self, weights_only: bool = False) -> None:
        """Takes back the memory that still sleeps, or that of the weights alone. Waking twice is allowed, and
        so is a pool without an engine left. Wholly awake, it starts others in the places of dead engines.

        ValueError: the engines were not started for it.
        """
        ...

    def take_events(self) -> list[Event]:
        """Deaths and returns of engines since the last call."""
        ...

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """Process -> {"host": bytes, and on GPUs "gpu": bytes}: the most that it has held so far."""
        ...

    def close(self) -> None:
        """Ends every engine. Called once, last."""
        ...


def deal(work: Sequence[Work], engines: int) -> list[list[Work]]:
    """The work of each engine: whole groups, dealt from the heaviest to the lightest to the least loaded.

    An engine has its work in the order of `work`. A group's siblings stay together because they share their
    prompt in the cache. The work of a group is its prompt, once, and the tokens that its completions may
    still get. So with equal prompts every engine gets as many groups. It depends on lengths alone, so a run
    can be repeated exactly.

    Example: prompts of 10, 40 and 20 tokens, one completion of at most 100 tokens each, on two engines are
    works of 110, 140 and 120. Engine 0 gets the prompt of 40, engine 1 those of 10 and 20.
    """
    groups: dict[int, list[int]] = {}
    for i, item in enumerate(work):
        groups.setdefault(item.group_id, []).append(i)
    members = list(groups.values())
    heavy = [len(work[own[0]].prompt.token_ids) + sum(work[i].left for i in own) for own in members]
    rows = longest_first(heavy, engines)
    assert rows is not None  # only a capacity can make it None
    return [[work[i] for group in sorted(row) for i in members[group]] for row in rows]


class LocalRolloutPool:
    """Implements `RolloutPool` with one engine in this process. Timeouts do nothing: no call can be ended."""

    runs_beside = False

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.events: list[Event] = []

    @property
    def engines(self) -> dict[str, RolloutEngine]:
        return {"engine-0": self.engine}

    def start(self) -> EngineInfo:
        return self.engine.info()

    def submit(self, work: Sequence[Work]) -> None:
        self.engine.submit(work)

    def advance(
        self, ticks: int | Mapping[str, int] | None = None, seconds: float | None = None
    ) -> dict[str, Progress]:
        own = ticks.get("engine-0", 0) if isinstance(ticks, Mapping) else ticks
        return {"engine-0": self.engine.advance(own, seconds)}

    def withdraw(self) -> list[Work]:
        return sorted(self.engine.withdraw(), key=lambda item: item.key)

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        return self.engine.generate(prompts, spec, request_ids)

    def logprobs_of(self, sequences: Sequence[np.ndarray], timeout: float) -> dict[str, list[np.ndarray]]:
        return {"engine-0": self.engine.logprobs_of(sequences)}

    def start_weight_update(self, timeout: float) -> None:
        self.engine.start_weight_update()

    def abandon_update(self) -> bool:
        return False

    def take_events(self) -> list[Event]:
        return []

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
