"""Rollouts -> mini-batches of token-budgeted micro-batches, balanced over data-parallel replicas.

Sequences are never cut and never padded. Global denominators are counted here, once: this is the only place
that knows the whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from gspo_dist.candidates import Candidates
from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.partition import longest_first
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import NO_VERSION, LogprobOutput, PackedBatch, Rollout

MicroBatches: TypeAlias = Sequence[Sequence[PackedBatch]]
"""`micro_batches[replica][i]`: what each data-parallel replica computes, one forward pass per micro-batch."""

Advantage: TypeAlias = float | np.ndarray
"""Of one rollout: a number for all of its tokens, or [N] with one for each token of the completion."""

ORDER_STREAM = 0x9ACC
"""Keeps the draws that shuffle groups apart from every other use of the run's seed and step."""


@dataclass(frozen=True)
class MiniBatch:
    """The data of one optimiser step."""

    micro_batches: tuple[tuple[PackedBatch, ...], ...]
    """`micro_batches[replica][i]`. Every replica has as many, because its collectives must pair up."""
    denominators: Denominators
    """Counts over the whole mini-batch, all replicas together: what the loss is divided by."""

    @property
    def replicas(self) -> int:
        """Data-parallel copies of the learner that share this mini-batch."""
        return len(self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens over all replicas, fillers included."""
        return sum(batch.num_tokens for batch in self.batches())

    def batches(self) -> Iterator[PackedBatch]:
        """Every micro-batch, replica after replica."""
        for replica in self.micro_batches:
            yield from replica

    def sequences(self) -> Iterator[tuple[PackedBatch, int]]:
        """Every sequence that has trained tokens, as (its micro-batch, its index there); fillers
        are left out.
        """
        for batch in self.batches():
            for sequence in range(batch.num_sequences):
                if batch.has_trained_tokens(sequence):
                    yield batch, sequence

    def with_outputs(
        self, outputs: Sequence[Sequence[LogprobOutput]], *, keep_routing: bool = False
    ) -> MiniBatch:
        """Attaches old log-probs: outputs[replica][i] belongs to micro_batches[replica][i].

        keep_routing: also attach the experts that the same pass recorded (R2).
        """
        return self._with(
            [
                [
                    batch.with_(
                        old_logprobs=output.logprobs,
                        routing=output.routing if keep_routing else batch.routing,
                        old_router=output.router,
                    )
                    for batch, output in zip(batches, outs, strict=True)
                ]
                for batches, outs in zip(self.micro_batches, outputs, strict=True)
            ]
        )

    def with_reference(self, outputs: Sequence[Sequence[LogprobOutput]]) -> MiniBatch:
        """Attaches reference log-probs: outputs[replica][i] belongs to micro_batches[replica][i]."""
        return self._with(
            [
                [b.with_(ref_logprobs=o.logprobs) for b, o in zip(batches, outs, strict=True)]
                for batches, outs in zip(self.micro_batches, outputs, strict=True)
            ]
        )

    def with_traces(self, rollouts: Sequence[Rollout]) -> MiniBatch:
        """Attaches the routing traces of the rollout batch that it was packed from (`attach_traces`)."""
        return self._with(with_traces(self.micro_batches, rollouts))

    def _with(self, micro_batches: MicroBatches) -> MiniBatch:
        return replace(self, micro_batches=tuple(tuple(batches) for batches in micro_batches))


def split_mini_batches(group_ids: Sequence[int], mini_batches: int, seed: Sequence[int]) -> list[np.ndarray]:
    """The rollouts (as indices) of each mini-batch: whole groups, in a random order that `seed` fixes,
    equal in groups.

    Example: group_ids [7, 7, 3, 3, 5, 5] in 3 mini-batches may give [[2, 3], [4, 5], [0, 1]].
    Raises ValueError when there are fewer groups than mini-batches (groups that were left out can cause it).
    """
    ids = np.asarray(group_ids)
    groups = np.unique(ids)
    if len(groups) < mini_batches:
        raise ValueError(
            f"mini_batches must be at most the number of groups in the batch: got {mini_batches} and "
            f"{len(groups)}"
        )
    order = np.random.default_rng([*seed, ORDER_STREAM]).permutation(groups)
    return [np.flatnonzero(np.isin(ids, part)) for part in np.array_split(order, mini_batches)]


def balanced_bins(lengths: Sequence[int], replicas: int, budget: int) -> list[list[list[int]]]:
    """bins[replica][i] = indices into `lengths`: every bin within `budget` tokens, as many bins
    on every replica.

    Sequences are dealt longest first to the emptiest bin (LPT), with the fewest bins that fit. Bins are then
    dealt heaviest first to the lightest replica that still has room for one. A bin is empty only when there
    are fewer sequences than bins (3 sequences of budget size on 2 replicas need 4 bins): `pack` fills it with
    a masked copy.

    Example: lengths [4, 3, 2, 1] on 2 replicas with budget 5 give [[[0, 3]], [[1, 2]]], 5 tokens each.
    Raises ValueError for fewer sequences than replicas, or a sequence longer than the budget.
    """
    if len(lengths) < replicas:
        raise ValueError(
            f"a mini-batch must hold a rollout for every replica: got {len(lengths)} for {replicas} replicas"
            "; raise rollout.prompts_per_step or group_size, or lower mini_batches"
        )
    longest = max(lengths)
    if longest > budget:
        raise ValueError(
            f"learner.token_budget must hold every sequence: got {budget} for one of {longest} tokens; raise "
            "it"
        )
    count = max(1, -(-sum(lengths) // (budget * replicas)))
    while (bins := longest_first(lengths, count * replicas, capacity=budget)) is None:
        count += 1
    loads = sorted(bins, key=lambda members: -sum(lengths[i] for i in members))
    dealt: list[list[list[int]]] = [[] for _ in range(replicas)]
    totals = [0] * replicas
    for members in loads:
        lightest = min((r for r in range(replicas) if len(dealt[r]) < count), key=lambda r: (totals[r], r))
        dealt[lightest].append(sorted(members))
        totals[lightest] += sum(lengths[i] for i in members)
    return dealt


def pack_sequences(
    rollouts: Sequence[Rollout], advantages: Sequence[Advantage], index: Sequence[int]
) -> PackedBatch:
    """Lays `rollouts[i] for i in index` end to end, with each one's advantage on its tokens;
    no routing traces.

    Advantages per token stand on the completion's tokens, and the prompt's have 0.

    Example: index [4, 2], where rollout 4 has prompt (5, 6), completion (7, 8) and advantage 1, and rollout 2
    has prompt (9,), completion (3,) and advantage -1:

        token_ids     [5 6 7 8 9 3]      cu_seqlens     [0 4 6]
        position_ids  [0 1 2 3 0 1]      rollout_index  [4 2]
        loss_mask     [F F T T F T]      advantages     [1 1 1 1 -1 -1]

    Where version 8 sampled token 7 and version 12 tokens 8 and 3, policy_versions is [-1 -1 8 12 -1 12].
    """
    chosen = [rollouts[i] for i in index]
    lengths = np.array([r.num_tokens for r in chosen])
    cu = np.concatenate([[0], np.cumsum(lengths)])
    total = int(cu[-1])
    tokens = np.zeros(total, np.int64)
    mask = np.zeros(total, np.bool_)
    engine = np.zeros(total, np.float32)
    versions = np.full(total, NO_VERSION, np.int32)
    advantage = np.zeros(total, np.float32)
    candidates = _candidates(chosen)
    own = [advantages[i] for i in index]
    for rollout, given, start, stop in zip(chosen, own, cu[:-1], cu[1:], strict=True):
        completion = rollout.completion
        answer = start + len(rollout.prompt.token_ids)
        tokens[start:answer] = rollout.prompt.token_ids
        # One number is laid on the prompt too, where nothing reads it.
        advantage[answer if isinstance(given, np.ndarray) else start : stop] = given
        tokens[answer:stop] = completion.token_ids
        mask[answer:stop] = completion.loss_mask
        engine[answer:stop] = np.where(completion.loss_mask, completion.logprobs, 0.0)
        versions[answer:stop] = np.where(completion.loss_mask, completion.policy_versions, NO_VERSION)
    return PackedBatch(
        token_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(cu[:-1], lengths)),
        cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
        loss_mask=torch.from_numpy(mask),
        advantages=torch.from_numpy(advantage),
        rollout_logprobs=torch.from_numpy(engine),
        rollout_index=torch.tensor(list(index), dtype=torch.int64),
        policy_versions=torch.from_numpy(versions),
        candidate_ids=None if candidates is None else torch.from_numpy(candidates.ids),
        candidate_logprobs=None if candidates is None else torch.from_numpy(candidates.logprobs),
    )


def _candidates(rollouts: Sequence[Rollout]) -> Candidates | None:
    """Those of the completions, end to end; a prompt's tokens have none."""
    return Candidates.join(
        [
            part
            for r in rollouts
            for part in (
                (len(r.prompt.token_ids), None),
                (len(r.completion), r.completion.candidates),
            )
        ]
    )


def attach_traces(batch: PackedBatch, rollouts: Sequence[Rollout]) -> PackedBatch:
    """`batch` with its sequences' routing traces, taken from the rollout batch: a copy, to be
    dropped after use.

    Raises ValueError that names the rollout whose trace is missing or truncated.
    """
    traces = []
    for rollout in (rollouts[i] for i in batch.rollout_index.tolist()):
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
        traces.append(trace)
    return batch.with_(routing=RoutingTrace.concat(traces))


def with_traces(micro_batches: MicroBatches, rollouts: Sequence[Rollout]) -> MicroBatches:
    """`attach_traces` for every micro-batch."""
    return tuple(tuple(attach_traces(batch, rollouts) for batch in batches) for batches in micro_batches)


def masked_copy(batch: PackedBatch) -> PackedBatch:
    """A filler: it runs like any micro-batch, so that collectives pair up, and trains nothing."""
    return batch.with_(
        loss_mask=torch.zeros_like(batch.loss_mask), advantages=torch.zeros_like(batch.advantages)
    )


def pack(
    rollouts: Sequence[Rollout],
    advantages: Sequence[Advantage],
    *,
    replicas: int,
    token_budget: int,
    mini_batches: int,
    max_completion_length: int,
    seed: Sequence[int],
) -> list[MiniBatch]:
    """The mini-batches of one rollout batch. `advantages`: of each rollout one number, or one per token of
    its completion.

    `seed` (numbers, for example the run's seed and the step's index) fixes the order of the groups. Routing
    traces stay with the rollouts; `MiniBatch.with_traces` attaches them for the time of their use.

    Raises ValueError for a rollout without a trained token (named), a sequence over the budget,
    too few rollouts.
    """
    if len(rollouts) != len(advantages):
        raise ValueError(
            f"advantages must have one entry per rollout: got {len(advantages)} for {len(rollouts)}"
        )
    for rollout in rollouts:
        if not rollout.completion.loss_mask.any():
            raise ValueError(
                f"rollout {rollout.rollout_id} has no trained token (empty or fully masked completion)"
            )
    return [
        _mini_batch(rollouts, advantages, members.tolist(), replicas, token_budget, max_completion_length)
        for members in split_mini_batches([r.group_id for r in rollouts], mini_batches, seed)
    ]


def _mini_batch(
    rollouts: Sequence[Rollout],
    advantages: Sequence[Advantage],
    members: Sequence[int],
    replicas: int,
    token_budget: int,
    max_completion_length: int,
) -> MiniBatch:
    """`members` packed: their bins as micro-batches, an empty bin as a masked copy of the shortest member."""
    bins = balanced_bins([rollouts[i].num_tokens for i in members], replicas, token_budget)
    shortest = min(members, key=lambda i: rollouts[i].num_tokens)
    batches = tuple(
        tuple(
            pack_sequences(rollouts, advantages, [members[i] for i in places])
            if places
            else masked_copy(pack_sequences(rollouts, advantages, [shortest]))
            for places in replica
        )
        for replica in bins
    )
    tokens = sum(int(rollouts[i].completion.loss_mask.sum()) for i in members)
    return MiniBatch(batches, Denominators(len(members), tokens, max_completion_length))


def unpack(batch: PackedBatch, values: torch.Tensor) -> dict[int, np.ndarray]:
    """Per-token values [T] of a packed batch by rollout index: the trained tokens only, in order; no fillers.

    Example: with the batch of `pack_sequences` above, values [.1 .2 .3 .4 .5 .6] give {4: [.3 .4], 2: [.6]}.
    """
    return {
        rollout: values[batch.rows(s)][batch.loss_mask[batch.rows(s)]].numpy()
        for s, rollout in enumerate(batch.rollout_index.tolist())
        if batch.has_trained_tokens(s)
    }
