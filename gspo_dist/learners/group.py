"""The learner group's protocol as the trainer sees it, and the group of one local learner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gspo_dist.config import WeightSyncConfig
from gspo_dist.learners.learner import Learner, OptimStep
from gspo_dist.learners.loss import LossSpec
from gspo_dist.learners.parking import Parking
from gspo_dist.learners.profile import Profiler
from gspo_dist.metrics.stat import Stat
from gspo_dist.packing import MicroBatches, MiniBatch
from gspo_dist.types import LogprobOutput
from gspo_dist.weights.export import write_hf_folder
from gspo_dist.weights.send import SentReport, Transport, make_transport, send_weights
from gspo_dist.weights.stream import NamedTensor


class LearnerGroup(Protocol):
    """All ranks of the learner as one. The trainer drives it; data is a mini-batch split by replica.

    Every verb returns when all ranks have done it. Where ranks are processes, every verb may also raise what
    the group's transport of calls raises: a dead rank, by name, and a rank that has not answered within
    `learner.timeout_s`. After an error the ranks may differ, so the group can only be closed.
    """

    @property
    def policy_version(self) -> int:
        """Completed optimiser steps."""
        ...

    def start(self) -> None:
        """Builds every rank's learner. The first verb, called once.

        Raises ValueError for settings that cannot run.
        """
        ...

    def logprobs(
        self,
        micro_batches: MicroBatches,
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[list[LogprobOutput]]:
        """`Learner.logprobs` of every replica: outputs[replica][i] is of micro_batches[replica][i].

        Changes nothing, so it may be called any number of times. Raises as `Learner.logprobs` does.
        """
        ...

    def forward_backward(self, mini: MiniBatch, spec: LossSpec) -> dict[str, Stat]:
        """Adds the gradient of a mini-batch's loss. Returns the stats of all ranks, merged, on the host.

        A second call before `optim_step` adds a second mini-batch to the step. Raises FloatingPointError,
        naming the rollout, when a log-prob or the loss is not finite.
        """
        ...

    def optim_step(self) -> OptimStep:
        """Makes one optimiser step and counts `policy_version` up. Once per mini-batch.

        A gradient that is not finite changes nothing: what is returned says that the step was skipped.
        """
        ...

    def send_weights(self, sync: WeightSyncConfig, engines: Mapping[str, Any]) -> SentReport:
        """Publishes the current weights to all engines, and returns when all have loaded every bucket.

        engines: by name. The first call connects to them, and so does one with others or after a failure.

        May be called again. Raises WeightSyncError when an engine took something else than was sent, and what
        an engine raised. Then the engines hold a mixture of versions: publish again before they generate.
        """
        ...

    def export(self, source: Path, target: Path) -> int:
        """Writes the weights as an HF folder, with `source`'s config and tokenizer. Returns how many tensors.

        Changes nothing in the learner. The folder appears whole. Raises ValueError when `target` exists and
        is not empty, so a second call needs another target.
        """
        ...

    def save(self, folder: Path) -> None:
        """Starts the save of every rank's state to `folder`, which must exist and be visible to every rank.

        Complete after `wait_saved`. Raises ValueError when a rank does not see the folder, OSError when
        a disk is full.
        """
        ...

    def load(self, folder: Path, policy_version: int) -> None:
        """Restores what `save` wrote. May be called again.

        policy_version: the one that was saved.

        Raises ValueError for a checkpoint that is torn, of another model, or of a layout that cannot be read.
        """
        ...

    def wait_saved(self) -> None:
        """Returns when every started save is on disk, at once where there is none. Raises what it raised."""
        ...

    def start_profile(self, ranks: Sequence[int]) -> None:
        """Has these ranks record what they compute. May be called again, and begins anew then.

        Raises what torch's profiler raises.
        """
        ...

    def stop_profile(self, ranks: Sequence[int], folder: Path) -> list[Path]:
        """Ends what `start_profile` began. Returns the files that were written, those of every rank.

        Empty where nothing was recorded. Raises OSError when a file cannot be written. The ranks compute on
        all the same.
        """
        ...

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Moves what the ranks hold on their GPUs to host memory, all or all but the weights.

        May be called again. Verbs whose memory sleeps raise RuntimeError until `wake_up`. The weights alone
        are enough for `send_weights`, `export` and `logprobs`.
        """
        ...

    def wake_up(self, *, weights_only: bool = False) -> None:
        """Moves it back, bit for bit. May be called again, also on a group that never slept."""
        ...

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """Peak bytes by process and kind since the start. Empty where another part counts them."""
        ...

    def close(self) -> None:
        """Ends the learners and frees what they hold. The last verb. A second call does nothing."""
        ...


# Of an export, which sends nothing: large enough for few gathers, small beside a host's memory.
EXPORT_BUCKET_BYTES = 256 << 20


def hf_items(learner: Learner) -> Iterator[NamedTensor]:
    """The learner's weights, one HF-named tensor after the other."""
    for bucket in learner.weights(EXPORT_BUCKET_BYTES):
        yield from bucket


class LocalLearnerGroup:
    """One learner in this process. Delivers weights by calling the engines' methods."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.transport: Transport | None = None
        self.closed = False
        self.profiler = Profiler()
        self.parking = Parking(learner)

    @property
    def policy_version(self) -> int:
        """The learner's own count."""
        return self.learner.policy_version

    def start(self) -> None:
        """The learner was built with the group."""

    def logprobs(
        self,
        micro_batches: MicroBatches,
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[list[LogprobOutput]]:
        (batches,) = micro_batches
        self.parking.require(states=reference)
        return [
            self.learner.logprobs(
                batches, record_routing=record_routing, record_scores=record_scores, reference=reference
            )
        ]

    def forward_backward(self, mini: MiniBatch, spec: LossSpec) -> dict[str, Stat]:
        (batches,) = mini.micro_batches
        self.parking.require()
        return {name: stat.cpu() for name, stat in self.learner.forward_backward(batches, spec).items()}

    def optim_step(self) -> OptimStep:
        self.parking.require()
        return self.learner.optim_step()

    def send_weights(self, sync: WeightSyncConfig, engines: Mapping[str, Any]) -> SentReport:
        self.parking.require(states=False)
        if self.transport is None:
            self.transport = self._connect(sync, engines)

        def deliver(info: dict[str, Any]) -> None:
            for engine in engines.values():
                engine.update_weights(info)

        stream = self.learner.weights(sync.bucket_bytes, stacked=True)

        return send_weights(stream, self.transport, deliver)

    def _connect(self, sync: WeightSyncConfig, engines: Mapping[str, Any]) -> Transport:
        """Opens the transport with every engine, once per run."""
        if sync.transport != "shm":
            raise ValueError(
                f"a run in one process syncs through shared memory: got rollout.weight_sync.transport "
                f"{sync.transport}; unset cluster.in_process"
            )
        transport = make_transport(sync.transport, check=sync.check)
        for i, engine in enumerate(engines.values()):
            engine.init_weight_sync(transport.init_info(i))
        transport.connect()
        return transport

    def export(self, source: Path, target: Path) -> int:
        self.parking.require(states=False)
        return write_hf_folder(hf_items(self.learner), source, target)

    def save(self, folder: Path) -> None:
        self.parking.require()
        self.learner.save(folder)

    def load(self, folder: Path, policy_version: int) -> None:
        self.parking.require()
        self.learner.load(folder)

    def wait_saved(self) -> None:
        self.learner.wait_saved()

    def start_profile(self, ranks: Sequence[int]) -> None:
        """There is one rank, 0."""
        self.profiler.start()

    def stop_profile(self, ranks: Sequence[int], folder: Path) -> list[Path]:
        return self.profiler.stop(folder, "rank-0")

    def sleep(self, *, keep_weights: bool = False) -> None:
        self.parking.sleep(keep_weights=keep_weights)

    def wake_up(self, *, weights_only: bool = False) -> None:
        self.parking.wake_up(weights_only=weights_only)

    def peak_memory(self) -> dict[str, dict[str, int]]:
        """The one process is counted by the rollout pool."""
        return {}

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.transport is not None:
            self.transport.close()
        self.learner.close()
