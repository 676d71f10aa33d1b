"""The learner group's protocol as the trainer sees it, and the group of one local learner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from gspo_dist.config import WeightSyncConfig
from gspo_dist.learners.learner import Learner, OptimStep
from gspo_dist.learners.loss import LossSpec
from gspo_dist.metrics.stat import Stat
from gspo_dist.packing import MiniBatch
from gspo_dist.types import LogprobOutput
from gspo_dist.weights.export import write_hf_folder
from gspo_dist.weights.send import SentReport, make_transport, send_weights
from gspo_dist.weights.stream import NamedTensor


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

    def send_weights(self, sync: WeightSyncConfig, engines: Mapping[str, Any]) -> SentReport: ...

    def export(self, source: Path, target: Path) -> int: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path, policy_version: int) -> None: ...

    def wait_saved(self) -> None: ...

    def empty_cache(self) -> None: ...

    def peak_memory(self) -> dict[str, dict[str, int]]: ...

    def close(self) -> None: ...


EXPORT_BUCKET_BYTES = 256 << 20


def hf_items(learner: Learner) -> Iterator[NamedTensor]:
    """The learner's weights, one HF-named tensor after the other."""
    for bucket in learner.weights(EXPORT_BUCKET_BYTES):
        yield from bucket


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
        return {name: stat.cpu() for name, stat in self.learner.forward_backward(batches, spec).items()}

    def optim_step(self) -> OptimStep:
        return self.learner.optim_step()

    def send_weights(self, sync: WeightSyncConfig, engines: Mapping[str, Any]) -> SentReport:
        if self.transport is None:
            if sync.transport != "shm":
                raise ValueError(
                    f"a run in one process syncs through shared memory: got rollout.weight_sync.transport "
                    f"{sync.transport}; unset cluster.in_process"
                )
            self.transport = make_transport(sync.transport, check=sync.check)
            for i, engine in enumerate(engines.values()):
                engine.init_weight_sync(self.transport.init_info(i))
            self.transport.connect()
        return send_weights(
            self.learner.weights(sync.bucket_bytes),
            self.transport,
            lambda info: [e.update_weights(info) for e in engines.values()],
        )

    def export(self, source: Path, target: Path) -> int:
        return write_hf_folder(hf_items(self.learner), source, target)

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path, policy_version: int) -> None:
        self.learner.load(folder)

    def wait_saved(self) -> None:
        self.learner.wait_saved()

    def empty_cache(self) -> None:
        """Engine and learner are one process: there is nothing to hand over."""

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """The one process is counted by the rollout pool."""
        return {}

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        self.learner.close()
