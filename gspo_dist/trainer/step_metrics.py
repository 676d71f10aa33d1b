"""Statistics of a step as the numbers that are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gspo_dist.learners.learner import OptimStep
from gspo_dist.metrics.stat import Stat, results
from gspo_dist.objectives.diagnostics import ratio_quantiles
from gspo_dist.objectives.mismatch import mismatch_metrics

COUNTS = ("objective/tokens", "objective/sequences")
"""Sums that are meant over the whole step."""
BY_MINI_BATCH = ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative", "approx_kl_k3")


def mini_batch_metrics(stats: Mapping[str, Stat], index: int) -> dict[str, float]:
    """The clip fractions of one mini-batch: off-policyness grows with its index."""
    return {
        f"objective/mini_batch_{index}/{name}": stats[f"objective/{name}"].result()
        for name in BY_MINI_BATCH
        if f"objective/{name}" in stats
    }


def update_metrics(stats: Mapping[str, Stat], optim: Sequence[OptimStep]) -> dict[str, float]:
    """objective/*, mismatch/*, moe/* and learner/* metrics over all mini-batches of a step."""
    out = {
        name: value
        for name, value in results(dict(stats)).items()
        if not name.startswith(("mismatch/", "moment/"))
    }
    for name in [n for n, stat in stats.items() if n in out and stat.reduce == "sum" and n not in COUNTS]:
        out[name] /= len(optim)  # sums of one mini-batch, averaged over the step's
    if "values/sequence_log_ratio" in stats:
        ratios = np.exp(stats["values/sequence_log_ratio"].value.numpy())
        out |= {f"objective/sequence_{name}": value for name, value in ratio_quantiles(ratios).items()}
    mean, square = (
        out.pop("objective/sequence_log_ratio_mean"),
        out.pop("objective/sequence_log_ratio_square"),
    )
    out["objective/log_ratio_mean"] = mean
    out["objective/log_ratio_std"] = math.sqrt(max(square - mean * mean, 0.0))
    if any(name.startswith("mismatch/") for name in stats):
        out |= mismatch_metrics({n: s for n, s in stats.items() if n.startswith(("mismatch/", "moment/"))})
    out["learner/grad_norm"] = sum(o.grad_norm for o in optim) / len(optim)
    out["learner/lr"] = optim[-1].lr
    out["learner/policy_version"] = float(optim[-1].policy_version)
    return out
