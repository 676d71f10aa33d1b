"""An objective of one's own: a soft trust region on the sequence instead of a clip.

    gspo train experiment=quickstart objective=custom \
      objective.name=gspo_dist.examples.squared:SQUARED +objective.params.strength=0.5

With a copy in your working directory: `PYTHONPATH=. gspo train ... objective.name=squared:SQUARED`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_dist.objectives import Objective, ObjectiveSpec, Segments, Surrogate


def squared(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    strength: float = 1.0,
) -> Surrogate:
    """-(A log r) + strength / 2 (log s)^2 per token, with s the sequence ratio: the geometric mean of the r.

    Every tensor is [N], one entry per trained token of S sequences. There is no padding and no batch axis.
    `segments` maps between tokens and sequences. Keyword arguments are parameters that a run can set.
    """
    log_ratio = logprobs - old_logprobs
    sequence = segments.expand(segments.mean(log_ratio))
    # Nothing is clipped here. Where a bound binds, say so: the clip fractions are counted from these.
    never = torch.zeros_like(log_ratio, dtype=torch.bool)
    loss = -advantages * log_ratio + 0.5 * strength * sequence**2
    return Surrogate(loss, ratio=log_ratio.exp().detach(), clipped_low=never, clipped_high=never)


# The spec says what the loss means: how it is averaged, with which advantages, and what its parameters are.
SQUARED = Objective(
    ObjectiveSpec(
        "squared", aggregation="sequence_mean", advantage="group_std", defaults={"strength": 1.0}, clip=None
    ),
    squared,
)
