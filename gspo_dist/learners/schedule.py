"""Learning-rate schedule, the same arithmetic on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

from gspo_dist.config import OptimizerConfig


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """factor(k): share of the peak learning rate at optimiser step k (0-based): warm-up k+1/warmup, then the schedule.

    Worked example: warmup 2, linear, total 6, min_lr_ratio 0 -> 1/2, 1, 1, 3/4, 1/2, 1/4.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
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
