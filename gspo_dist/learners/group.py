"""The learner group's protocol as the trainer sees it, and the group of one local learner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gspo_dist.learners.learner import Learner, OptimStep
from gspo_dist.learners.step import LossSpec
from gspo_dist.objectives.stats import Stat
from gspo_dist.packing import MiniBatch
from gspo_dist.types import LogprobOutput
from gspo_dist.weights.publish import SentReport, make_transport, send_weights


class LearnerGroup(Protocol):
    """All ranks of the learner as one; data is a mini-batch split by data-parallel rank."""

    policy_version: int

    def start(self) -> None: ...

    def logprobs(
        self, mini: MiniBatch, *, record_routing: bool = False, reference: bool = False
    ) -> list[list[LogprobOutput]]:
        """outputs[rank][i] of micro_batches[rank][i]."""
        ...

    def forward_backward(self, mini: MiniBatch, spec: LossSpec) -> dict[str, Stat]: ...

    def optim_step(self) -> OptimStep: ...

    def send_weights(
        self, transport: str, engines: Mapping[str, Any], bucket_bytes: int, timeout: float
    ) -> SentReport: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path, policy_version: int) -> None: ...

    def wait_saved(self) -> None: ...

    def peak_memory(self) -> dict[str, dict[str, int]]: ...

    def close(self) -> None: ...


class LocalLearnerGroup:
    """One learner in this process; delivers weights by calling the engines' methods."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.transport: Any = None

    @property
    def policy_version(self) -> int:
        return self.learner.policy_version

    def start(self) -> None:
        """The learner was built with the group."""

    def logprobs(
        self, mini: MiniBatch, *, record_routing: bool = False, reference: bool = False
    ) -> list[list[LogprobOutput]]:
        (batches,) = mini.micro_batches
        return [self.learner.logprobs(batches, record_routing=record_routing, reference=reference)]

    def forward_backward(self, mini: MiniBatch, spec: LossSpec) -> dict[str, Stat]:
        (batches,) = mini.micro_batches
        return self.learner.forward_backward(batches, spec)

    def optim_step(self) -> OptimStep:
        return self.learner.optim_step()

    def send_weights(
        self, transport: str, engines: Mapping[str, Any], bucket_bytes: int, timeout: float
    ) -> SentReport:
        if self.transport is None:
            self.transport = make_transport(transport, bucket_bytes=bucket_bytes, timeout_s=timeout)
            self.transport.open(lambda info: [e.init_weight_sync(info) for e in engines.values()])
        return send_weights(
            self.learner.weights(bucket_bytes), self.transport,
            lambda info: [e.update_weights(info) for e in engines.values()],
        )

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path, policy_version: int) -> None:
        self.learner.load(folder)

    def wait_saved(self) -> None:
        self.learner.wait_saved()

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """The one process is counted by the rollout pool."""
        return {}

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        self.learner.close()
