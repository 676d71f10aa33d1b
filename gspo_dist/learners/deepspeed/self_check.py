"""The self-check of the DeepSpeed learner under ZeRO 3, in a process of its own.

    python -m gspo_dist.learners.deepspeed.self_check [FOLDER] < config.json   # a JSON list of findings

ZeRO 3 builds and fills a model in a way of its own (`load`). Under the other stages the learner has the eager
learner's model. On one rank it is partitioned all the same: a parameter is empty until DeepSpeed gathers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_dist.learners.own_process import answer, examine
from gspo_dist.learners.properties import Finding
from gspo_dist.learners.stream_names import of_family

if TYPE_CHECKING:
    from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner


def check(config: dict[str, Any], whole: Path | None = None) -> list[Finding]:
    """What `own_process.examine` finds of the DeepSpeed learner under ZeRO 3."""
    return examine(config, _make, of_family, whole)


def _make(folder: Path) -> DeepSpeedLearner:
    from gspo_dist.config import DeepSpeedConfig, LearnerConfig
    from gspo_dist.learners.deepspeed.config import import_deepspeed
    from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner

    # DeepSpeed takes over the process group that there is, so nobody has to find a free port.
    import_deepspeed("cpu").init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    config = LearnerConfig(
        backend="deepspeed", world_size=1, precision="fp32", deepspeed=DeepSpeedConfig(zero_stage=3)
    )
    return DeepSpeedLearner(config, folder, total_steps=1)


if __name__ == "__main__":
    answer(check)
