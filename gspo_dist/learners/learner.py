"""The learner's protocol: the verbs that the trainer drives, the same on every backend and on every rank.

A learner is one rank (one process). The ranks of one data-parallel replica get the same micro-batches, other
replicas get others. Every rank is called with the same verb at the same time, because the verbs hide
collectives: a rank that is left out lets the others wait until their timeout. `LearnerGroup` sends each rank
its part and merges what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gspo_dist.learners.loss import LossSpec
from gspo_dist.learners.parking import Held
from gspo_dist.metrics.stat import Stat
from gspo_dist.types import LogprobOutput, PackedBatch

WeightBucket = list[tuple[str, torch.Tensor]]
"""HF parameter names with full (unsharded) tensors, together about one bucket in size."""


@dataclass(frozen=True)
class OptimStep:
    """What one optimiser step did."""

    grad_norm: float
    """Global L2 norm of the gradient, over all ranks, before clipping."""
    lr: float
    """Learning rate that was used."""
    policy_version: int
    """The version that the step made, or the one before where it was skipped."""
    skipped: bool = False
    """Whether the gradient was not finite, so that weights, optimiser and version stayed what they were."""
    loss_scale: float | None = None
    """What the loss was multiplied by (loss_scale.py); None where precision needs none."""


class Learner(Protocol):
    """One rank of the process group that owns the trainable weights."""

    policy_version: int
    """Completed optimiser steps."""

    @property
    def data_parallel_rank(self) -> int:
        """Which replica's micro-batches this rank computes."""
        ...

    @property
    def is_exporter(self) -> bool:
        """True on the one rank whose `weights()` yields tensors; the others take part and yield nothing."""
        ...

    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[LogprobOutput]:
        """Log-probs and entropies of the trained tokens, without gradients, one output per micro-batch.

        record_routing: also return the expert choices of this pass (R2).
        record_scores: also return what the routers thought of them (rspo).
        reference: under the frozen starting policy, which was kept if kl_coef is above 0.

        A batch that carries a routing trace is computed under its experts (R3), except by the reference.
        Pipeline stages that do not own the head return outputs too (broadcast from the last stage).

        Changes nothing, so it may be called any number of times. Collective. Raises ValueError
        when no reference was kept, when a trace does not fit the model, and when ranks get
        different numbers of micro-batches.
        """
        ...

    def forward_backward(self, batches: Sequence[PackedBatch], spec: LossSpec) -> dict[str, Stat]:
        """Adds the gradient of one mini-batch's loss, of which `batches` is this rank's part.

        Returns mergeable stats.

        The denominators in `spec` are global: the sum of all ranks' losses is the mini-batch's loss. Of ranks
        that computed the same tokens, one returns the stats and the others an empty dict.

        Collective. Gradients add up until `optim_step`, so a second call adds a second mini-batch to the
        step. Raises FloatingPointError, naming the rollout, on every rank when a log-prob or the loss is
        not finite, and ValueError as `logprobs` does. After an error the gradients are in no defined
        state: stop, or load.
        """
        ...

    def optim_step(self) -> OptimStep:
        """Clips, steps, advances the schedule, clears the gradients. Collective.

        Once per `forward_backward` of a mini-batch: another call would step again, on gradients of zero, and
        count a version. Where the gradient's norm is not finite, every rank skips the step: it clears the
        gradients and changes nothing else.
        """
        ...

    def weights(
        self, bucket_bytes: int, *, stacked: bool = False, exporters: Sequence[int] | None = None
    ) -> Iterator[WeightBucket]:
        """Streams the current weights under HF names, about `bucket_bytes` at a time.

        stacked: experts travel together where they can, as `weights.stacks` describes.
        exporters: the ranks that yield tensors, all of them the same; None is the one that `is_exporter`.

        Collective: every rank exhausts its iterator. Tensors are valid until the next bucket is asked for and
        must not be written to. It may be called again whenever no other verb runs in between.
        """
        ...

    def held(self) -> Held:
        """What it keeps on its device between two verbs, for `parking.Parking` to move away and back."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights, optimiser, schedule and random states to `folder`, which all ranks see.

        Collective; complete on return or after `wait_saved`. Writes over what an earlier save left there.
        Raises OSError, naming the file, when the disk is full.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote: the next step is the one that the saving learner would have made.

        Collective; may be called again. Raises ValueError when `folder` holds no checkpoint, a torn one, or
        one of another model or of a layout that this learner cannot read.
        """
        ...

    def wait_saved(self) -> None:
        """Returns when every started save is on disk, at once where there is none. Raises what it raised."""
        ...

    def close(self) -> None:
        """Leaves the process group. Collective, the last verb, once."""
        ...
