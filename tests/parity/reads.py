"""What some objectives read beside log-probs, made up: an engine's likeliest tokens, and old routers."""

from __future__ import annotations

import torch

from gspo_dist.routing.trace import RouterScores
from gspo_dist.types import PackedBatch

EXPERTS = 8
"""Of every mixture of experts in the parity tests."""
CANDIDATES = 6
"""Of every token. One in six is none."""


def with_candidates(batch: PackedBatch, vocabulary: int) -> PackedBatch:
    """Random tokens with nine tenths of an engine's mass between them, the same on every rank and backend."""
    rng = torch.Generator().manual_seed(int(batch.token_ids.sum()))
    shape = (batch.num_tokens, CANDIDATES)
    ids = torch.rand(batch.num_tokens, vocabulary, generator=rng).argsort(1)[:, :CANDIDATES]
    logprobs = torch.randn(shape, generator=rng).log_softmax(1) + torch.tensor(0.9).log()
    logprobs[:, -1] = -torch.inf
    return batch.with_(candidate_ids=ids.int(), candidate_logprobs=logprobs)


def with_other_routers(batch: PackedBatch, scores: RouterScores) -> PackedBatch:
    """The batch with an old policy whose routers were some tenths of a nat off `scores`.

    How far depends on token, layer and expert. The order of a token's experts is a backend's own.
    """
    rng = torch.Generator().manual_seed(int(batch.token_ids.sum()))
    tokens, layers, _ = scores.expert_ids.shape
    off = 0.4 * torch.randn(tokens, layers, EXPERTS, generator=rng)
    logprobs = scores.logprobs + off.gather(2, scores.expert_ids.long())
    return batch.with_(old_router=RouterScores(scores.expert_ids, logprobs))


def by_expert(scores: RouterScores) -> torch.Tensor:
    """[T, L, E]: the log-prob of each expert that was used, 0 elsewhere."""
    tokens, layers, _ = scores.expert_ids.shape
    return torch.zeros(tokens, layers, EXPERTS).scatter(2, scores.expert_ids.long(), scores.logprobs)
