"""What a loss needs to know of its whole mini-batch before the first micro-batch: m2po's cut.

The mask drops the tokens that moved most in the mini-batch, and how far a token has moved is known after a
forward pass of the policy as it is now. So a mini-batch costs one more pass, in which nothing is learnt. None
is made where old log-probs were recomputed and the policy has not moved since: all log ratios are 0 then.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gspo_dist.learners.forward import logprobs_within
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.learners.loss import LossSpec, trained_index
from gspo_dist.objectives import second_moment
from gspo_dist.packing import MiniBatch


def with_second_moment_cut(
    spec: LossSpec,
    mini: MiniBatch,
    learner: LearnerGroup,
    forward_token_budget: int | None = None,
    *,
    unmoved: bool,
) -> LossSpec:
    """`spec` with the cut of this mini-batch, where its objective reads one.

    mini: with the routes that the update replays.
    forward_token_budget: most tokens of a pass. None computes micro-batches as they are packed.
    unmoved: the policy is still the one of the old log-probs.
    """
    if "second_moment_cut" not in spec.objective.spec.reads:
        return spec
    if unmoved:
        return replace(spec, second_moment_cut=math.inf)
    values: list[torch.Tensor] = []
    found, _ = logprobs_within(learner, mini.micro_batches, forward_token_budget)
    for batches, outputs in zip(mini.micro_batches, found, strict=True):
        for batch, output in zip(batches, outputs, strict=True):
            index = trained_index(batch)
            old = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
            values.append(second_moment.squares(output.logprobs[index], old[index], batch.advantages[index]))
    limit = spec.objective.resolved["second_moment"]
    return replace(spec, second_moment_cut=second_moment.cut(torch.cat(values), limit))
