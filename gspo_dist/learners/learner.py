"""The learner's protocol: the verbs that the trainer drives, the same on every backend and on every rank.

A learner is one rank. Ranks of one data-parallel replica get the same micro-batches, other replicas get others; every
rank is called with the same verb at the same time, because the verbs hide collectives. `LearnerGroup` (actors) sends
each rank its part and merges what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gspo_dist.learners.loss import LossSpec
from gspo_dist.metrics.stat import Stat
from gspo_dist.types import LogprobOutput, PackedBatch

WeightBucket = list[tuple[str, torch.Tensor]]
"""HF parameter names with full (unsharded) tensors, together about one bucket in size."""


@dataclass(frozen=True)
class OptimStep:
    """One optimiser step: global gradient L2 norm before clipping, learning rate used, new policy version."""

    grad_norm: float
    lr: float
    policy_version: int


class Learner(Protocol):
    """One rank of the process group that owns the trainable weights."""

    policy_version: int
    """Completed optimiser steps."""
    data_parallel_rank: int
    """Which replica's micro-batches this rank computes."""
    is_exporter: bool
    """True on the one rank whose `weights()` yields tensors; the others take part and yield nothing."""

    def logprobs(
        self, batches: Sequence[PackedBatch], *, record_routing: bool = False, reference: bool = False
    ) -> list[LogprobOutput]:
        """Log-probs and entropies of the trained tokens, without gradients, one output a micro-batch.

        record_routing: also return the expert choices of this pass (R2). A batch that carries a routing trace is
        computed under its experts (R3). reference: under the frozen starting policy (needs kl_coef > 0).
        Pipeline stages that do not own the head return outputs too (broadcast from the last stage).
        """
        ...

    def forward_backward(self, batches: Sequence[PackedBatch], spec: LossSpec) -> dict[str, Stat]:
        """Adds the gradient of one mini-batch's loss (this rank's micro-batches of it); returns mergeable stats.

        The summed loss of all ranks is the mini-batch loss: denominators in `spec` are global. Stats of model-parallel
        twins are returned by one of them only (the others return an empty dict).
        """
        ...

    def optim_step(self) -> OptimStep:
        """Clips, steps, advances the schedule, clears gradients."""
        ...

    def weights(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Streams the current weights under HF names, about `bucket_bytes` at a time (collective)."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights, optimiser, schedule and random states to `folder` (collective, complete on return or after
        `wait_saved`)."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote (collective)."""
        ...

    def wait_saved(self) -> None:
        """Returns when every started save is on disk."""
        ...

    def close(self) -> None:
        """Leaves the process group."""
        ...
