"""What the DeepSpeed learner refuses before it makes a process group. What it computes: tests/parity."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_dist.config import LearnerConfig
from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner


def test_a_rank_outside_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must fit learner\.world_size 4: got 0 and 2"):
        DeepSpeedLearner(
            LearnerConfig(backend="deepspeed", world_size=4), tmp_path, total_steps=1, rank=0, world_size=2
        )
