"""The rollout engine's protocol: sample, score, and take new weights. One engine is one process (or one GPU group)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gspo_dist.types import Completion, Prompt, SamplingSpec


@dataclass(frozen=True)
class SyncReceipt:
    """What an engine says after a weight update: its version and the checksum of every tensor as it arrived."""

    policy_version: int
    checksums: Mapping[str, int]
    tensors: int
    bytes: int
    seconds_checking: float


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine for checks and reports."""

    name: str
    device: str
    max_model_len: int
    vocab_size: int
    num_experts: int
    moe_layers: int
    top_k: int
    can_record_routing: bool
    workers: int


class RolloutEngine(Protocol):
    """Samples groups of completions under one version of the weights."""

    policy_version: int

    def info(self) -> EngineInfo: ...

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        """`spec.n` completions for each prompt, in order. `request_ids` (one a prompt) and `spec.seed` fix the random
        stream of every completion, whichever engine runs it. Raises ValueError for a prompt over the context."""
        ...

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs [len - 1] float32 of every token after the first, under the engine's weights and sampling
        temperature: the probe of a weight sync. Sequences of 2 to max_model_len - 1 tokens."""
        ...

    def init_weight_sync(self, init_info: Mapping[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Takes one bucket (the info says where it lies) and loads it."""
        ...

    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        """Makes the new weights effective, drops caches of the old ones, and reports what arrived."""
        ...

    def sleep(self) -> None:
        """Frees device memory while the learner works (colocated)."""
        ...

    def wake_up(self, weights_only: bool = False) -> None:
        """Takes its memory back, all that still sleeps of it, or the weights alone: then it can be updated, not used."""
        ...

    def close(self) -> None: ...
