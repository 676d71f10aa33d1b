"""Small batches that run beside the training batch: samples of it, and bare sequences to
compare log-probs on.

They have micro-batches like a mini-batch, within `learner.forward_token_budget`, and no denominators: nothing
is trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gspo_dist.packing import MicroBatches, balanced_bins, masked_copy
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import PackedBatch


def take_sequences(
    picks: Sequence[tuple[PackedBatch, int]], *, replicas: int, token_budget: int
) -> MicroBatches:
    """Single sequences (batch, index in it) cut out of packed batches, dealt by length to micro-batches of at
    most `token_budget` tokens.

    Every replica gets as many micro-batches. Where sequences are fewer than micro-batches, masked copies fill
    up, because every replica must run.
    Example: sequences of 5, 3 and 4 tokens on 2 replicas give micro-batches of 5 and 7 tokens. With a budget
    of 6 every replica runs two, of 5 and 3 and of 4 and 3 tokens, and the last of them is a masked copy.
    Raises ValueError for a sequence that is longer than the budget.
    """
    singles = [cut(batch, sequence) for batch, sequence in picks]
    singles += [masked_copy(min(singles, key=_length))] * (replicas - len(singles))
    return deal(singles, replicas=replicas, token_budget=token_budget)[0]


Spot = tuple[int, int, slice]
"""Where a sequence went: replica, micro-batch, rows in it."""


def deal(
    singles: Sequence[PackedBatch], *, replicas: int, token_budget: int
) -> tuple[MicroBatches, list[Spot]]:
    """Batches of one sequence each joined to micro-batches of at most `token_budget` tokens, as many on every
    replica, and the place of each. An empty micro-batch is a masked copy of the shortest sequence.

    Example: sequences of 5, 3 and 4 tokens on one replica with a budget of 9 give the micro-batches [5 4] and
    [3], and the places (0, 0, 0:5), (0, 1, 0:3) and (0, 0, 5:9).
    """
    lengths = [_length(single) for single in singles]
    places: list[Spot] = [(0, 0, slice(0))] * len(singles)

    def joined(members: Sequence[int], replica: int, index: int) -> PackedBatch:
        if not members:
            return masked_copy(min(singles, key=_length))
        order = sorted(members, key=lambda i: -lengths[i])  # the longest first, as they were dealt
        start = 0
        for i in order:
            places[i] = replica, index, slice(start, start + lengths[i])
            start += lengths[i]
        return join([singles[i] for i in order])

    bins = balanced_bins(lengths, replicas, token_budget)
    dealt = tuple(
        tuple(joined(members, replica, index) for index, members in enumerate(own))
        for replica, own in enumerate(bins)
    )
    return dealt, places


def _length(batch: PackedBatch) -> int:
    return batch.num_tokens


def from_sequences(
    sequences: Sequence[tuple[np.ndarray, int]], *, replicas: int, token_budget: int
) -> MicroBatches:
    """Bare sequences (token ids, start) with the tokens from `start` on marked: those whose log-probs
    are asked for.

    The first token of a sequence is never marked, because nothing predicts it. rollout_index counts the
    sequences. Example: [([4, 5, 6, 7], 2)] on one replica marks tokens 6 and 7.
    """
    picks = []
    for i, (tokens, start) in enumerate(sequences):
        count = len(tokens)
        zeros = torch.zeros(count)
        batch = PackedBatch(
            token_ids=torch.as_tensor(np.asarray(tokens, np.int64)),
            position_ids=torch.arange(count),
            cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
            loss_mask=torch.arange(count) >= max(1, start),
            advantages=zeros,
            rollout_logprobs=zeros,
            rollout_index=torch.tensor([i]),
        )
        picks.append((batch, 0))
    return take_sequences(picks, replicas=replicas, token_budget=token_budget)


_PER_TOKEN = ("token_ids", "position_ids", "loss_mask", "advantages", "rollout_logprobs")
_OPTIONAL = ("old_logprobs", "ref_logprobs", "policy_versions")
_APART = ("cu_seqlens", "rollout_index", "routing")  # a test holds that these are all of PackedBatch


def cut(batch: PackedBatch, sequence: int) -> PackedBatch:
    """One sequence of a packed batch as a batch of its own."""
    rows = batch.rows(sequence)
    fields: dict[str, Any] = {name: getattr(batch, name)[rows] for name in _PER_TOKEN}
    for name in _OPTIONAL:
        values = getattr(batch, name)
        fields[name] = None if values is None else values[rows]
    return PackedBatch(
        **fields,
        cu_seqlens=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        rollout_index=batch.rollout_index[sequence : sequence + 1],
        routing=None if batch.routing is None else batch.routing[rows],
    )


def join(parts: Sequence[PackedBatch]) -> PackedBatch:
    """Packed batches laid end to end. An optional field is kept when every part has it."""
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    fields: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in _PER_TOKEN}
    for name in _OPTIONAL:
        values = [getattr(part, name) for part in parts]
        fields[name] = None if any(v is None for v in values) else torch.cat(values)
    traces = [part.routing for part in parts if part.routing is not None]
    return PackedBatch(
        **fields,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]),
        rollout_index=torch.cat([part.rollout_index for part in parts]),
        routing=RoutingTrace.concat(traces) if len(traces) == len(parts) else None,
    )
