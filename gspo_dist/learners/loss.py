"""From a model's log-probs to the loss of one micro-batch: the part that every learner shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gspo_dist.config import CorrectionConfig
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives import mismatch, staleness
from gspo_dist.objectives.aggregate import Denominators, Segments
from gspo_dist.objectives.centering import expected_score
from gspo_dist.objectives.objective import Objective
from gspo_dist.objectives.staleness import LagOffsets
from gspo_dist.types import PackedBatch


class InexactError(FloatingPointError):
    """Engine and learner gave one token two log-probs under `learner.consistency=exact`."""


@dataclass(frozen=True)
class LossSpec:
    """What one mini-batch optimises. Raises ValueError for an offset together with own_mean."""

    objective: Objective
    """Surrogate, aggregation and KL term."""
    denominators: Denominators
    """Counts of the whole mini-batch, over all micro-batches and ranks."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Importance correction of the mismatch learner against engine."""
    offset: float = 0.0
    """Taken out of every log ratio before clipping, in nats."""
    lag_offsets: LagOffsets | None = None
    """Taken out of the log ratios of each lag, beside `offset`."""
    own_mean: bool = False
    """Take out the mean log ratio over the micro-batch's own sequences instead. Only for the first mini-batch
    of a step, where the policy has not moved yet: later that mean also contains what was learnt."""
    measure_mismatch: bool = False
    """Also return statistics of learner against engine, from old_logprobs where they were recomputed, else
    from this pass."""
    policy_version: int | None = None
    """The learner's at the start of the step: tokens of this version are fresh, and only they measure the
    mismatch. The others measure staleness. None: every token counts as fresh."""
    second_moment_cut: float | None = None
    """m2po's mask: the largest squared log ratio that it keeps, found over the whole mini-batch before the
    first micro-batch (trainer/whole_batch.py). None for other objectives."""
    exact: bool = False
    """Raise `InexactError` where `measure_mismatch` sees a fresh token on which engine and learner differ."""

    def __post_init__(self) -> None:
        if self.own_mean and self.offset:
            raise ValueError(
                f"a loss takes out an offset or the micro-batch's own mean: got offset={self.offset} and "
                "own_mean=True; leave one of them out"
            )


def trained_index(batch: PackedBatch) -> torch.Tensor:
    """Places of the trained tokens in the packed batch, int64 [N]. The hidden state before each predicts it.

    Example: sequences of 3 and 2 tokens, of which the last 2 and the last 1 are trained, give [1, 2, 4].
    Raises ValueError when the first token of a sequence is marked: nothing predicts it.
    """
    index = batch.loss_mask.nonzero().flatten()
    starts = batch.cu_seqlens[:-1].long()
    if batch.loss_mask[starts].any():
        which = int(batch.loss_mask[starts].nonzero()[0])
        raise ValueError(
            f"loss_mask must be False on the first token of a sequence (nothing predicts it): sequence "
            f"{which} of the micro-batch starts with a trained token; give it a prompt"
        )
    return index


def missing(batches: Sequence[PackedBatch], spec: LossSpec) -> ValueError | None:
    """The error for batches that lack what the objective reads of them. None where they have it.

    A learner asks before it runs anything, so that every rank raises.
    """
    reads = spec.objective.spec.reads
    if "expected_score" in reads and any(b.candidate_ids is None for b in batches):
        return ValueError(
            "the objective reads the engine's likeliest tokens, and these rollouts came without them: "
            "use an engine that gives them (rollout=vllm or rollout=reference)"
        )
    if "router_shift" in reads and any(b.old_router is None for b in batches):
        return ValueError(
            "the objective reads what the old policy's routers thought, and these rollouts came without it: "
            "set objective.old_logprobs=recompute, whose pass records it"
        )
    return None


def lags_of(batch: PackedBatch, policy_version: int | None) -> torch.Tensor | None:
    """[T] int64: optimiser steps from the weights that sampled a token to `policy_version`.

    Tokens that are not trained have 0. None where every trained token is fresh.

    Example: versions [-1, 8, 12] with the last two trained give [0, 4, 0] at version 12.
    """
    if policy_version is None or batch.policy_versions is None:
        return None
    lags = torch.where(batch.loss_mask, policy_version - batch.policy_versions.long(), 0)
    return lags if bool(lags.any()) else None


def fresh_part(
    batch: PackedBatch, lags: torch.Tensor | None, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The fresh ones of the tokens at `index`: which, of which sequences, and how many sequences those are.

    Returns a bool [N], the sequences of the fresh tokens renumbered without gaps, and their count.

    Every context-parallel rank counts the sequences of the whole batch, so that their numbers agree.
    Example: of sequences 0, 1, 2 only 0 and 2 have fresh tokens: they become 0 and 1, of 2.
    """
    fresh = batch.loss_mask if lags is None else batch.loss_mask & (lags == 0)
    ids = batch.sequence_ids()
    present = torch.unique(ids[fresh])
    keep = fresh[index]
    return keep, torch.searchsorted(present, ids[index][keep]), len(present)


def micro_batch_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    batch: PackedBatch,
    spec: LossSpec,
    *,
    index: torch.Tensor | None = None,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    router_shift: torch.Tensor | None = None,
    candidate_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Stat]]:
    """This rank's share of the mini-batch loss, and its stats.

    Sums of the losses and merges of the stats, over micro-batches and ranks, give those of the mini-batch.
    logprobs: [N] float32 nats, with gradient; entropy: [N] nats. Both belong to the tokens at `index`, by
    default all trained tokens. Under context parallelism `index` holds this rank's trained tokens, and
    `all_reduce` sums over the ranks that share the sequences. router_shift: [N], how little the routers have
    moved since the old policy, where the learner measured that. candidate_logprobs: [N, K], with gradient, of
    the engine's likeliest tokens, where the objective reads them.
    Raises FloatingPointError naming the rollout of a log-prob that is not finite, or those of such a loss.
    Raises InexactError as `spec.exact` says.
    """
    if index is None:
        index = trained_index(batch)
    device = logprobs.device
    if all_reduce is None and not len(index):
        # A filler levels the number of micro-batches. Its graph must run backward as on the other ranks.
        return logprobs.sum() * 0.0, {}
    ids = batch.sequence_ids()[index]
    segments = Segments(ids.to(device), batch.num_sequences, all_reduce)
    rollout_logprobs = batch.rollout_logprobs[index].to(device)
    old = rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs[index].to(device)
    advantages = batch.advantages[index].to(device)
    ref = None if batch.ref_logprobs is None else batch.ref_logprobs[index].to(device)
    _refuse_non_finite(logprobs.detach(), ids, batch)
    correction = mismatch.correction(
        spec.correction.name,
        old,
        rollout_logprobs,
        advantages,
        segments,
        low=spec.correction.low,
        high=spec.correction.high,
        logprobs=logprobs.detach(),
    )
    extra, seen = _extra(spec, batch, index, router_shift, candidate_logprobs)
    result = spec.objective.loss(
        logprobs,
        old,
        advantages,
        segments,
        spec.denominators,
        ref_logprobs=ref,
        correction=correction,
        offset=_offset(logprobs.detach(), old, segments, batch, index, spec),
        extra=extra,
    )
    if not torch.isfinite(result.loss):
        raise FloatingPointError(
            f"loss is {result.loss.item()} in a micro-batch of rollouts {batch.rollout_index.tolist()}"
        )
    stats = dict(result.stats) | {"objective/entropy": Stat.mean(entropy)} | seen
    if spec.measure_mismatch:
        learner = logprobs.detach() if batch.old_logprobs is None else old
        stats |= _against_engine(learner, rollout_logprobs, segments, batch, index, spec)
    return result.loss, stats


def _extra(
    spec: LossSpec,
    batch: PackedBatch,
    index: torch.Tensor,
    router_shift: torch.Tensor | None,
    candidate_logprobs: torch.Tensor | None,
) -> tuple[dict[str, float | torch.Tensor], dict[str, Stat]]:
    """What the objective's surrogate reads beside log-probs, and what is reported of it.

    An objective that lacks what it reads is told so by `Objective.loss`.
    """
    found: dict[str, float | torch.Tensor] = {}
    seen: dict[str, Stat] = {}
    reads = spec.objective.spec.reads
    if router_shift is not None:
        seen["objective/router_shift"] = Stat.mean(router_shift)
        if "router_shift" in reads:
            found["router_shift"] = router_shift
    if candidate_logprobs is not None and batch.candidate_logprobs is not None:
        engine = batch.candidate_logprobs[index].to(candidate_logprobs.device)
        cap = spec.objective.resolved.get("weight_cap")
        found["expected_score"], rest = expected_score(engine, candidate_logprobs, cap)
        seen["objective/candidates_rest"] = Stat.mean(rest)
    if "second_moment_cut" in reads:
        if spec.second_moment_cut is None:
            raise ValueError(
                f"{spec.objective.spec.name} masks over the whole mini-batch, of which a micro-batch knows a "
                "part: LossSpec.second_moment_cut must be given (trainer/whole_batch.py finds it)"
            )
        found["second_moment_cut"] = spec.second_moment_cut
    return found, seen


def _offset(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    segments: Segments,
    batch: PackedBatch,
    index: torch.Tensor,
    spec: LossSpec,
) -> float | torch.Tensor:
    """What is taken out of the log ratios before clipping, in nats: one number, or [N] by age."""
    offset = float(segments.mean(logprobs - old).mean()) if spec.own_mean else spec.offset
    if spec.lag_offsets is None:
        return offset
    lags = lags_of(batch, spec.policy_version)
    if lags is None:
        lags = torch.zeros_like(batch.token_ids)
    known = torch.unique(lags[batch.loss_mask]).tolist()
    return offset + staleness.offsets_by_lag(
        logprobs - old, lags[index].to(logprobs.device), segments, known, spec.lag_offsets
    )


def _against_engine(
    learner: torch.Tensor,
    engine: torch.Tensor,
    segments: Segments,
    batch: PackedBatch,
    index: torch.Tensor,
    spec: LossSpec,
) -> dict[str, Stat]:
    """Learner at the start of the step against engine, both [N].

    Mismatch of the fresh tokens, and staleness of the batch where others are among them.
    """
    lags = lags_of(batch, spec.policy_version)
    if spec.exact:
        _refuse_inexact(learner, engine, lags, batch, index)
    if lags is None:
        return mismatch.mismatch_stats(learner, engine, segments)
    stats = staleness.staleness_stats(
        learner - engine,
        lags[index].to(learner.device),
        segments,
        torch.unique(lags[batch.loss_mask]).tolist(),
        clip=spec.objective.clip,
        sequence_level=spec.objective.spec.sequence_level,
    )
    keep, ids, count = fresh_part(batch, lags, index)
    if count:
        fresh = Segments(ids.to(learner.device), count, segments.all_reduce)
        keep = keep.to(learner.device)
        stats |= mismatch.mismatch_stats(learner[keep], engine[keep], fresh)
    return stats


def _refuse_inexact(
    learner: torch.Tensor,
    engine: torch.Tensor,
    lags: torch.Tensor | None,
    batch: PackedBatch,
    index: torch.Tensor,
) -> None:
    """InexactError that names the first fresh token whose two log-probs, [N], are not the same number."""
    differs = learner.cpu() != engine.cpu()
    if lags is not None:
        differs &= lags[index].cpu() == 0
    if differs.any():
        at = int(differs.nonzero()[0])
        sequence = int(batch.sequence_ids()[index[at]])
        place = int(index[at]) - int(batch.cu_seqlens[sequence])
        raise InexactError(
            f"learner.consistency=exact: engine and learner differ on {int(differs.sum())} of {len(differs)} "
            f"tokens, first on token {place} of rollout {int(batch.rollout_index[sequence])}: "
            f"{engine[at].item()!r} and {learner[at].item()!r} nats; a weight sync, a template, a route or a "
            "kernel is not what it should be: `gspo audit RUN_DIR` names the operator if it is one"
        )


def _refuse_non_finite(logprobs: torch.Tensor, ids: torch.Tensor, batch: PackedBatch) -> None:
    """FloatingPointError that names the rollout of the first log-prob, [N], that is not finite."""
    bad = ~torch.isfinite(logprobs)
    if bad.any():
        at = int(bad.nonzero()[0])
        rollout = int(batch.rollout_index[ids[at]])
        raise FloatingPointError(
            f"logprobs of rollout {rollout} are not finite: {logprobs[at].item()} at trained token {at}"
        )
