"""Rollouts -> mini-batches of token-budgeted micro-batches, balanced over data-parallel ranks.

Sequences are never cut and never padded. Global denominators are counted here, once: the only place that knows the
whole mini-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import LogprobOutput, PackedBatch, Rollout


@dataclass(frozen=True)
class MiniBatch:
    """One optimiser step's data: `micro_batches[rank][i]`, as many on every rank, and the global denominators."""

    micro_batches: tuple[tuple[PackedBatch, ...], ...]
    denominators: Denominators

    def with_outputs(
        self, outputs: Sequence[Sequence[LogprobOutput]], *, keep_routing: bool = False
    ) -> MiniBatch:
        """Attaches old log-probs (and, for R2, the recorded routes), output[rank][i] to micro_batches[rank][i]."""
        return replace(
            self,
            micro_batches=tuple(
                tuple(
                    b.with_(old_logprobs=o.logprobs, routing=o.routing if keep_routing else b.routing)
                    for b, o in zip(rank, outs, strict=True)
                )
                for rank, outs in zip(self.micro_batches, outputs, strict=True)
            ),
        )

    def with_traces(self, rollouts: Sequence[Rollout]) -> MiniBatch:
        """Attaches the routing traces of the rollout batch that it was packed from (`attach_traces`)."""
        return replace(
            self,
            micro_batches=tuple(
                tuple(attach_traces(b, rollouts) for b in rank) for rank in self.micro_batches
            ),
        )

    def with_reference(self, outputs: Sequence[Sequence[LogprobOutput]]) -> MiniBatch:
        """Attaches reference log-probs."""
        return replace(
            self,
            micro_batches=tuple(
                tuple(b.with_(ref_logprobs=o.logprobs) for b, o in zip(rank, outs, strict=True))
                for rank, outs in zip(self.micro_batches, outputs, strict=True)
            ),
        )

    @property
    def num_tokens(self) -> int:
        return sum(b.num_tokens for rank in self.micro_batches for b in rank)

    def efficiency(self, token_budget: int) -> float:
        """Tokens held over tokens that the launched micro-batches could hold."""
        launched = sum(len(rank) for rank in self.micro_batches)
        return self.num_tokens / (launched * token_budget)


def split_mini_batches(group_ids: Sequence[int], mini_batches: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Indices of the rollouts of each mini-batch: whole groups, in a random order fixed by `seed`, equal in groups.

    Raises ValueError when there are fewer groups than mini-batches (dropped groups can cause it).
    """
    ids = np.asarray(group_ids)
    groups = np.unique(ids)
    if len(groups) < mini_batches:
        raise ValueError(
            f"mini_batches must be at most the number of groups in the batch: got {mini_batches} and {len(groups)}"
        )
    order = np.random.default_rng([*seed, 0x9ACC]).permutation(groups)
    return [np.flatnonzero(np.isin(ids, part)) for part in np.array_split(order, mini_batches)]


def balanced_bins(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """bins[rank][i] = indices into `lengths`: every bin within `budget` tokens, as many bins on every rank.

    Longest first into the emptiest bin (LPT), with the fewest bins that fit; bins are then dealt to ranks heaviest
    first to the lightest rank that still has room for one. A bin is empty only when there are fewer sequences than
    bins (3 sequences of budget size on 2 ranks need 4 bins): `pack` fills it with a masked copy, because every rank
    must run as many micro-batches.
    """
    if len(lengths) < ranks:
        raise ValueError(
            f"a mini-batch must hold a rollout for every rank: got {len(lengths)} for {ranks} ranks"
        )
    longest = max(lengths)
    if longest > budget:
        raise ValueError(
            f"learner.token_budget must hold every sequence: got {budget} for one of {longest} tokens; raise it"
        )
    count = max(1, -(-sum(lengths) // (budget * ranks)))
    while True:
        bins = _lpt(lengths, count * ranks, budget)
        if bins is not None:
            break
        count += 1
    loads = sorted(bins, key=lambda b: -sum(lengths[i] for i in b))
    out: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for members in loads:
        rank = min((r for r in range(ranks) if len(out[r]) < count), key=lambda r: (totals[r], r))
        out[rank].append(sorted(members))
        totals[rank] += sum(lengths[i] for i in members)
    return out


def _lpt(lengths: Sequence[int], bins: int, budget: int) -> list[list[int]] | None:
    heap = [(0, b) for b in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(heap)
        if load + lengths[i] > budget:
            return None
        members[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return members


def pack_sequences(
    rollouts: Sequence[Rollout], advantages: Sequence[float], index: Sequence[int]
) -> PackedBatch:
    """Lays `rollouts[i] for i in index` end to end, with each one's advantage on its tokens; no routing traces."""
    chosen = [rollouts[i] for i in index]
    prompts = [len(r.prompt.token_ids) for r in chosen]
    lengths = np.array([r.num_tokens for r in chosen])
    cu = np.concatenate([[0], np.cumsum(lengths)])
    total = int(cu[-1])
    tokens = np.zeros(total, np.int64)
    mask = np.zeros(total, np.bool_)
    engine = np.zeros(total, np.float32)
    advantage = np.repeat(np.asarray([advantages[i] for i in index], np.float32), lengths)
    for rollout, start, p in zip(chosen, cu, prompts, strict=False):
        completion = rollout.completion
        stop = start + rollout.num_tokens
        tokens[start : start + p] = rollout.prompt.token_ids
        tokens[start + p : stop] = completion.token_ids
        mask[start + p : stop] = completion.loss_mask
        engine[start + p : stop] = np.where(completion.loss_mask, completion.logprobs, 0.0)
    return PackedBatch(
        token_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(cu[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
        loss_mask=torch.from_numpy(mask),
        advantages=torch.from_numpy(advantage),
        rollout_logprobs=torch.from_numpy(engine),
        rollout_index=torch.tensor(list(index), dtype=torch.int64),
    )


def attach_traces(batch: PackedBatch, rollouts: Sequence[Rollout]) -> PackedBatch:
    """`batch` with its sequences' routing traces, taken from the rollout batch: a copy, to be dropped after use.

    Raises ValueError naming the rollout whose trace is missing or truncated."""
    chosen = [rollouts[i] for i in batch.rollout_index.tolist()]
    for rollout in chosen:
        trace = rollout.completion.routing
        if trace is None:
            raise ValueError(
                f"rollout {rollout.rollout_id} has no routing trace: its engine did not record one"
            )
        if len(trace) != rollout.num_tokens:
            raise ValueError(
                f"routing trace of rollout {rollout.rollout_id} is truncated: {len(trace)} rows for "
                f"{rollout.num_tokens} tokens"
            )
    return batch.with_(routing=RoutingTrace.concat([r.completion.routing for r in chosen]))


def _masked(batch: PackedBatch) -> PackedBatch:
    """A filler: runs like any micro-batch and trains nothing."""
    return batch.with_(
        loss_mask=torch.zeros_like(batch.loss_mask), advantages=torch.zeros_like(batch.advantages)
    )


def pack(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    ranks: int,
    token_budget: int,
    mini_batches: int,
    max_completion_length: int,
    seed: Sequence[int],
) -> list[MiniBatch]:
    """The mini-batches of one rollout batch. `advantages`: one a rollout. `seed` (numbers, e.g. run seed and step) fixes
    the order of the groups. Routing traces stay with the rollouts: `MiniBatch.with_traces` attaches them for use.

    Raises ValueError for a rollout without a trained token (named), a sequence over the budget, too few rollouts.
    """
    if len(rollouts) != len(advantages):
        raise ValueError(
            f"advantages must have one entry a rollout: got {len(advantages)} for {len(rollouts)}"
        )
    for rollout in rollouts:
        if not rollout.completion.loss_mask.any():
            raise ValueError(
                f"rollout {rollout.rollout_id} has no trained token (empty or fully masked completion)"
            )
    out = []
    for members in split_mini_batches([r.group_id for r in rollouts], mini_batches, seed):
        lengths = [rollouts[i].num_tokens for i in members]
        bins = balanced_bins(lengths, ranks, token_budget)
        shortest = int(min(members, key=lambda i: rollouts[i].num_tokens))
        batches = tuple(
            tuple(
                pack_sequences(rollouts, advantages, [int(members[i]) for i in b])
                if b
                else _masked(pack_sequences(rollouts, advantages, [shortest]))
                for b in rank
            )
            for rank in bins
        )
        tokens = sum(int(rollouts[i].completion.loss_mask.sum()) for i in members)
        out.append(MiniBatch(batches, Denominators(len(members), tokens, max_completion_length)))
    return out


def unpack(batch: PackedBatch, values: torch.Tensor) -> dict[int, np.ndarray]:
    """Per-token values of a packed batch by rollout index: the trained tokens only, in order."""
    out = {}
    cu = batch.cu_seqlens.tolist()
    for s, rollout in enumerate(batch.rollout_index.tolist()):
        rows = slice(cu[s], cu[s + 1])
        if not batch.loss_mask[rows].any():
            continue  # a filler
        out[rollout] = values[rows][batch.loss_mask[rows]].numpy()
    return out


def take_sequences(picks: Sequence[tuple[PackedBatch, int]], *, ranks: int) -> MiniBatch:
    """A mini-batch of single sequences cut out of packed batches, dealt to `ranks` by length: for probes and samples
    that run beside the training batch. Fewer sequences than ranks: the rest run masked copies of the first."""
    singles = [_cut(batch, s) for batch, s in picks]
    while len(singles) < ranks:
        singles.append(_masked(singles[0]))
    bins = _lpt([b.num_tokens for b in singles], ranks, 1 << 62)
    assert bins is not None
    batches = tuple((_join([singles[i] for i in members]),) for members in bins)
    tokens = sum(int(b.loss_mask.sum()) for b in singles)
    return MiniBatch(batches, Denominators(len(picks), max(tokens, len(picks)), 1))


def _cut(batch: PackedBatch, s: int) -> PackedBatch:
    """Sequence `s` of a packed batch as a batch of its own."""
    rows = slice(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
    return PackedBatch(
        token_ids=batch.token_ids[rows],
        position_ids=batch.position_ids[rows],
        cu_seqlens=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        loss_mask=batch.loss_mask[rows],
        advantages=batch.advantages[rows],
        rollout_logprobs=batch.rollout_logprobs[rows],
        rollout_index=batch.rollout_index[s : s + 1],
        old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[rows],
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows],
        routing=None if batch.routing is None else batch.routing[rows],
    )


def _join(parts: Sequence[PackedBatch]) -> PackedBatch:
    """Packed batches laid end to end."""

    def cat(name: str) -> torch.Tensor | None:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else torch.cat(values)

    lengths = torch.cat([p.cu_seqlens.diff() for p in parts])
    fields = (
        "token_ids",
        "position_ids",
        "loss_mask",
        "advantages",
        "rollout_logprobs",
        "rollout_index",
        "old_logprobs",
        "ref_logprobs",
    )
    return PackedBatch(
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]),
        routing=None if parts[0].routing is None else RoutingTrace.concat([p.routing for p in parts]),
        **{name: cat(name) for name in fields},
    )


def from_sequences(sequences: Sequence[tuple[np.ndarray, int]], ranks: int) -> MiniBatch:
    """Bare sequences (tokens, start) as a mini-batch whose tokens from `start` on are marked: what a log-prob probe
    scores. rollout_index counts the sequences."""
    picks = []
    for i, (tokens, start) in enumerate(sequences):
        n = len(tokens)
        mask = torch.arange(n) >= max(1, start)
        zeros = torch.zeros(n)
        picks.append(
            (
                PackedBatch(
                    token_ids=torch.as_tensor(np.asarray(tokens, np.int64)),
                    position_ids=torch.arange(n),
                    cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
                    loss_mask=mask,
                    advantages=zeros,
                    rollout_logprobs=zeros,
                    rollout_index=torch.tensor([i]),
                ),
                0,
            )
        )
    return take_sequences(picks, ranks=ranks)
