"""Passes in which nothing is trained, in packs of their own (`learner.forward_token_budget`).

A training pass keeps activations for its backward pass, and the token budget is what a GPU has room for then.
A pass without gradients keeps none, so it may hold several times as many tokens. The sequences of a
mini-batch are dealt anew for it, over all replicas, and what comes back is laid out as the mini-batch was.

Example: a budget of 8 tokens packed sequences of 5, 3, 4 and 4 tokens as [5 3] and [4 4]. With 16 tokens for
forward passes they run as [5 4 4 3], and the output is cut into [5 3] and [4 4] again.

Log-probs are those of the training packs up to rounding: a sequence sees itself alone, but a matrix product
may add in another order when it has other rows. With `learner.consistency=exact` they are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gspo_dist.learners.group import LearnerGroup
from gspo_dist.packing import MicroBatches
from gspo_dist.probes import Spot, cut, deal, join
from gspo_dist.routing.trace import RouterScores, RoutingTrace
from gspo_dist.types import LogprobOutput, PackedBatch


@dataclass(frozen=True)
class Repacked:
    """A mini-batch's micro-batches, and those that a pass without gradients computes instead."""

    source: MicroBatches
    """As they are packed for training."""
    micro_batches: MicroBatches
    """As the pass computes them. Of the source they keep what a forward pass reads."""
    places: Sequence[Spot]
    """Where each sequence of the source went: replica after replica, micro-batch after micro-batch."""

    def restored(self, outputs: Sequence[Sequence[LogprobOutput]]) -> list[list[LogprobOutput]]:
        """What the pass said, laid out as the source is.

        outputs[replica][i] is of micro_batches[replica][i].
        """
        places = iter(self.places)

        def parts(batch: PackedBatch) -> Iterator[LogprobOutput]:
            for _ in range(batch.num_sequences):
                replica, index, rows = next(places)
                yield _rows(outputs[replica][index], rows)

        return [[_joined(list(parts(batch))) for batch in batches] for batches in self.source]


def repacked(micro_batches: MicroBatches, token_budget: int) -> Repacked:
    """The same sequences in micro-batches of at most `token_budget` tokens.

    Raises ValueError for a sequence that is longer than the budget.
    """
    singles = [
        cut(batch, sequence)
        for batches in micro_batches
        for batch in batches
        for sequence in range(batch.num_sequences)
    ]
    return Repacked(micro_batches, *deal(singles, replicas=len(micro_batches), token_budget=token_budget))


def logprobs_within(
    learner: LearnerGroup,
    micro_batches: MicroBatches,
    token_budget: int | None,
    *,
    attach: Callable[[MicroBatches], MicroBatches] = lambda batches: batches,
    **options: bool,
) -> tuple[list[list[LogprobOutput]], int]:
    """(`LearnerGroup.logprobs` of the micro-batches, forward passes that it took over all replicas).

    token_budget: most tokens of a pass. None computes the micro-batches as they are.
    attach: what the passes need beside (routing traces), put to them when they are packed, so that it is
    copied once.
    options: of `LearnerGroup.logprobs`.
    """
    work = None if token_budget is None else repacked(micro_batches, token_budget)
    computed = micro_batches if work is None else work.micro_batches
    outputs = learner.logprobs(attach(computed), **options)
    passes = sum(len(batches) for batches in computed)
    return (outputs if work is None else work.restored(outputs)), passes


def in_groups(batches: Sequence[PackedBatch], size: int) -> list[PackedBatch]:
    """`size` micro-batches after each other as one, with their routes and router scores. The last may be of
    fewer. Every rank makes as many of as many, whatever their lengths are.
    """
    groups = [batches[start : start + size] for start in range(0, len(batches), size)]
    return [group[0] if len(group) == 1 else _with_scores(group) for group in groups]


def _with_scores(group: Sequence[PackedBatch]) -> PackedBatch:
    scores = [batch.old_router for batch in group if batch.old_router is not None]
    return join(group).with_(old_router=_scores(scores) if len(scores) == len(group) else None)


def _rows(output: LogprobOutput, rows: slice) -> LogprobOutput:
    """Of some tokens. Views: `_joined` copies them."""
    router = output.router
    return LogprobOutput(
        output.logprobs[rows],
        output.entropy[rows],
        None if output.routing is None else output.routing[rows],
        None if router is None else RouterScores(router.expert_ids[rows], router.logprobs[rows]),
    )


def _joined(parts: Sequence[LogprobOutput]) -> LogprobOutput:
    """Outputs of sequences, end to end. Each of them has routes and scores, or none has."""
    traces = [part.routing for part in parts if part.routing is not None]
    scores = [part.router for part in parts if part.router is not None]
    return LogprobOutput(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.entropy for part in parts]),
        RoutingTrace.concat(traces) if traces else None,
        _scores(scores) if scores else None,
    )


def _scores(parts: Sequence[RouterScores]) -> RouterScores:
    return RouterScores(
        torch.cat([part.expert_ids for part in parts]), torch.cat([part.logprobs for part in parts])
    )
