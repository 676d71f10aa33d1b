"""The records of a learner's pass, which hold tensors: a packed micro-batch, and what a forward says of it.

Shapes: S sequences laid end to end in T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gspo_dist.routing.trace import RoutingTrace


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one data-parallel replica: S whole sequences laid end to end in T
    tokens, no padding.

    Entry t of every [T] field speaks of token t itself: `old_logprobs[t]` is log p(token t | the tokens
    before it in its sequence), which a model computes from the hidden state at t - 1. With prompt (5, 6) and
    completion (7, 8): token_ids = [5 6 7 8], position_ids = [0 1 2 3], loss_mask = [F F T T],
    rollout_logprobs = [0 0 lp(7) lp(8)].
    """

    token_ids: torch.Tensor
    """[T] int64."""
    position_ids: torch.Tensor
    """[T] int64: places within the sequence, from 0."""
    cu_seqlens: torch.Tensor
    """[S + 1] int32: sequence s is tokens cu_seqlens[s]:cu_seqlens[s + 1]."""
    loss_mask: torch.Tensor
    """[T] bool: True = trained on."""
    advantages: torch.Tensor
    """[T] float32."""
    rollout_logprobs: torch.Tensor
    """[T] float32: the engine's log-probs; 0 where nothing is trained."""
    rollout_index: torch.Tensor
    """[S] int64: each sequence's place in the rollout batch."""
    old_logprobs: torch.Tensor | None = None
    """[T] float32: the learner's own at the start of the update. None: the engine's are used."""
    ref_logprobs: torch.Tensor | None = None
    """[T] float32: the frozen starting policy's. None without a KL term."""
    routing: RoutingTrace | None = None
    """Expert ids by input token. Where present, the learner replays them."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_sequences(self) -> int:
        return int(self.rollout_index.numel())

    def rows(self, sequence: int) -> slice:
        """The tokens of one sequence (0..S-1): `token_ids[batch.rows(1)]`."""
        return slice(int(self.cu_seqlens[sequence]), int(self.cu_seqlens[sequence + 1]))

    def has_trained_tokens(self, sequence: int) -> bool:
        """Whether the sequence teaches anything. The masked copies that fill idle replicas do not."""
        return bool(self.loss_mask[self.rows(sequence)].any())

    def sequence_ids(self) -> torch.Tensor:
        """[T] int64: the sequence (0..S-1) of every token."""
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.cu_seqlens.diff().long())

    def with_(self, **changes: Any) -> PackedBatch:
        """A copy with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class LogprobOutput:
    """What one forward pass says of a packed batch."""

    logprobs: torch.Tensor
    """[T] float32: 0 where loss_mask is False."""
    entropy: torch.Tensor
    """[T] float32, in nats, of the same next-token distributions."""
    routing: RoutingTrace | None = None
    """The expert ids that this pass used, where it was asked to record them."""
