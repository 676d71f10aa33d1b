"""AdamW's settings and the learning-rate schedule, the same arithmetic on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from gspo_dist.config import OptimizerConfig


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """factor(k) is the share of the peak learning rate that optimiser step k (0-based) uses.

    Warm-up: (k + 1) / warmup_steps, so that step 0 already moves. Then the schedule, from 1 down to
    min_lr_ratio at step total_steps, which no step has, and min_lr_ratio after it (constant stays at 1).

    Worked example: warmup 2, linear, total 6, min_lr_ratio 0 -> 1/2, 1, 1, 3/4, 1/2, 1/4.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        # at least 1: a run may be all warm-up
        span = max(1, total_steps - config.warmup_steps)
        done = min(1.0, (step - config.warmup_steps) / span)
        if config.schedule == "linear":
            shape = 1.0 - done
        elif config.schedule == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            return 1.0
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape

    return factor


def set_groups(groups: Iterable[dict[str, Any]], config: OptimizerConfig, lr: float) -> None:
    """Gives an optimiser's groups of parameters `lr` and the configuration's betas, eps and weight decay.

    Every learner calls it before every step. A loaded optimiser has the settings that it was saved with, and
    no backend asks the configuration again, so a resume with other settings would keep the old ones in
    silence. For a backend that wraps optimisers, `groups` are those that its step reads.
    """
    for group in groups:
        group.update(lr=lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
