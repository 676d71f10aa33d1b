"""A held-out evaluation with a run's engines and rewards."""

from __future__ import annotations

import numpy as np

from gspo_dist.config import RewardConfig
from gspo_dist.evaluation.runner import evaluate_heldout
from gspo_dist.rewards.pool import LocalRewardPool
from gspo_dist.types import Completion, Prompt, SamplingSpec


def completion(text: str) -> Completion:
    columns = np.zeros(1, np.int64), np.ones(1, bool), np.zeros(1, np.float32), np.zeros(1, np.int32)
    return Completion(*columns, "stop", text)


def test_held_out_metrics_by_hand():
    """Two prompts of two completions: one of two right, then two of two."""
    prompts = [Prompt("p0", (1,), "q", "1"), Prompt("p1", (2,), "q", "2")]
    groups = [[completion("1"), completion("0")], [completion("2"), completion("2")]]
    pool = LocalRewardPool(RewardConfig())
    try:
        row = evaluate_heldout(lambda p, s: groups, pool, prompts, SamplingSpec(n=2, max_tokens=1))
    finally:
        pool.close()
    assert row == {
        "eval/heldout/accuracy": 0.75,
        "eval/heldout/avg@2": 0.75,
        "eval/heldout/avg@2_standard_error": 0.25,
        "eval/heldout/pass@1": 0.75,
        "eval/heldout/pass@2": 1.0,
        "eval/heldout/reward_mean": 0.75,
        "eval/heldout/completion_length_mean_tokens": 1.0,
        "eval/heldout/truncated_fraction": 0.0,
    }
