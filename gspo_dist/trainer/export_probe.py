"""What a learner says of a few tokens, kept with its checkpoint, so that an export can be held against it.

An export reads a checkpoint's files on any host, where no learner runs. Names, shapes and checksums say
that nothing got lost on the way into the folder. They do not say that the model in it is the one that
learned: two tensors that change places between the learner and its files look right. So each checkpoint
keeps the log-probs of random tokens by the learner that saved it, and transformers' own forward over the
folder must give them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gspo_dist.config import RunConfig
from gspo_dist.host import usable_memory
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.learners.hf_model import DTYPES
from gspo_dist.models.shape import read_shape
from gspo_dist.trainer.publisher import learner_logprobs
from gspo_dist.weights.export import probe_folder
from gspo_dist.weights.tolerance import LEVELS
from gspo_dist.weights.verify import WeightSyncError

SEQUENCES = 2
"""Sequences of a probe."""
TOKENS = 48
"""Tokens of each. All layers and all experts' names are in every token, so a few are enough."""
MEMORY_SHARE = 0.5
"""Of the host's free memory, which the model may take for its forward pass."""


def sequences(config: RunConfig, vocabulary: int) -> list[tuple[np.ndarray, int]]:
    """Random tokens, so that no prompt is needed: the same ones for the same vocabulary and budget."""
    length = min(TOKENS, config.learner.forward_budget)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (SEQUENCES, length))
    return [(row, 0) for row in tokens]


def take(learner: LearnerGroup, config: RunConfig, model: str | Path) -> list[list[float]]:
    """The learner's log-probs in nats of every token after the first, as numbers that JSON keeps exactly.

    model: the folder that the run started from. Costs one forward pass over a hundred tokens.
    """
    found = learner_logprobs(
        learner,
        sequences(config, read_shape(model).vocab),
        replicas=config.learner.data_parallel,
        token_budget=config.learner.forward_budget,
    )
    return [[float(value) for value in row] for row in found]


def compare(taken: Sequence[Sequence[float]], config: RunConfig, folder: Path) -> float:
    """Mean |difference| in nats between what was taken and transformers' log-probs over an exported folder.

    WeightSyncError when the mean passes rollout.weight_sync.probe_tolerance (null: what the precision
    explains) or transformers reads the folder otherwise; the folder is then moved to a name that ends in
    .refused, where nobody takes it for a model.
    """
    tolerance = config.rollout.weight_sync.probe_tolerance
    try:
        mean, _ = probe_folder(
            folder,
            sequences(config, read_shape(folder).vocab),
            [np.asarray(row, np.float32) for row in taken],
            tolerance if tolerance is not None else LEVELS[config.learner.precision].unknown_stop,
            temperature=config.rollout.temperature,
            dtype=DTYPES[config.learner.precision],
        )
    except WeightSyncError:
        folder.rename(folder.with_name(f"{folder.name}.refused"))
        raise
    return mean


def has_room(folder: Path) -> bool:
    """Whether this host can hold the model of a folder for a forward pass, beside what else it does."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size <= MEMORY_SHARE * usable_memory()[1]
