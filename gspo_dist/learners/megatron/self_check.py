"""The self-check of the megatron learner: its own model against transformers', in a process of its own.

    python -m gspo_dist.learners.megatron.self_check [FOLDER] < config.json   # a JSON list of findings

The layers are the ones that megatron-core has for a CPU. What a GPU computes with Transformer Engine's layers
is not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspo_dist.learners.own_process import answer, examine
from gspo_dist.learners.properties import Finding
from gspo_dist.learners.stream_names import Shapes
from gspo_dist.weights.folder import ModelFolder

if TYPE_CHECKING:
    from gspo_dist.learners.megatron.learner import MegatronLearner


def check(config: dict[str, Any], whole: Path | None = None) -> list[Finding]:
    """What `own_process.examine` finds of the megatron learner."""
    return examine(config, _make, streamed_shapes, whole)


def _make(folder: Path) -> MegatronLearner:
    from gspo_dist.config import LearnerConfig
    from gspo_dist.learners.megatron.learner import MegatronLearner

    config = LearnerConfig(backend="megatron", world_size=1, precision="fp32")
    return MegatronLearner(config, folder, total_steps=1)


def streamed_shapes(source: ModelFolder) -> Shapes:
    """What the learner streams of a model: built by the learner's own code on one rank, on the meta device.

    Needs the process groups of a learner.
    """
    from gspo_dist.config import MegatronConfig
    from gspo_dist.learners.megatron import model as builder
    from gspo_dist.learners.megatron.architecture import read_architecture
    from gspo_dist.learners.megatron.layout import check_layout
    from gspo_dist.learners.megatron.shards import streamed

    shape, settings = read_architecture(source.path), MegatronConfig()
    layout = check_layout(settings, shape, 1)
    built = builder.transformer_config(shape, layout, settings, "fp32", gpu=False)
    with torch.device("meta"):
        chunks = builder.build_chunks(shape, layout, built, gpu=False)
    return dict(streamed(chunks, shape))


if __name__ == "__main__":
    answer(check)
