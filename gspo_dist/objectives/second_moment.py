"""M2PO's mask over a whole mini-batch (arXiv 2510.01161, algorithm 1), as one number that every part can use.

The paper drops the trust-region token with the largest squared log ratio until the mean square of the rest is
at most tau. What is left is a set {x <= cut}, so the cut says it all. It is found from the squares of the
whole mini-batch and depends on nothing else: not on micro-batches, ranks or the order of the tokens. A rule
within each micro-batch would be another objective for every token budget.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def trust_region(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """bool [N]: tokens that have moved in the direction that A asks, the only ones that PPO would clip."""
    return ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))


@torch.no_grad()
def squares(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The squared log ratios of the trust-region tokens of a part of the mini-batch, float64 [M]."""
    log_ratio = logprobs.detach() - old_logprobs
    return log_ratio[trust_region(log_ratio, advantages)].double().square()


@torch.no_grad()
def cut(values: Tensor, second_moment: float) -> float:
    """What a square may be at most, so that the mean of those is at most `second_moment`; inf drops none.

    values: the `squares` of the whole mini-batch, in any order. Equal squares are kept or dropped together,
    where the paper would drop one after the other. The cut lies half-way to the first that is dropped, so
    that the last digit of a forward pass moves no token over it. It is at least `second_moment`: tokens
    below that cannot lift the mean above it.

    Example: squares 0.01, 0.04, 0.25 and 1 have the means 0.01, 0.025, 0.1 and 0.325 from the smallest on.
    second_moment 0.04 keeps two of them: the cut is (0.04 + 0.25) / 2 = 0.145.
    """
    ordered = values.double().sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    kept = int((means <= second_moment).sum())
    if kept == len(ordered):
        return math.inf
    # The first that is dropped takes its equals with it.
    kept = int((ordered[:kept] < ordered[kept]).sum())
    last = float(ordered[kept - 1]) if kept else 0.0
    return max(second_moment, (last + float(ordered[kept])) / 2.0)
