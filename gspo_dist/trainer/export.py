"""A run's checkpoint as an HF folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gspo_dist.checkpoint import Checkpoint, CheckpointStore
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import from_mapping, read_mapping
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.learners.hf_model import DTYPES
from gspo_dist.models.shape import read_shape
from gspo_dist.trainer.publisher import learner_logprobs
from gspo_dist.trainer.setup.checks import check_model, resolve_device
from gspo_dist.trainer.setup.factories import stored_weights
from gspo_dist.trainer.setup.processes import Processes
from gspo_dist.weights.export import probe_folder, write_hf_folder
from gspo_dist.weights.tolerance import LEVELS
from gspo_dist.weights.verify import WeightSyncError

PROBE_SEQUENCES = 2
"""Sequences of an export's probe."""
PROBE_TOKENS = 48
"""Tokens of each. All layers and all experts' names are in every token, so a few are enough."""

SMALL_BYTES = 1 << 30
"""Weights of a model whose export is probed without being asked to. Its learner starts in seconds."""


def run_config_of(run_dir: Path) -> RunConfig:
    """The resolved configuration that a run folder was made with. Raises ValueError where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"not a run folder: {run_dir} has no config.json")
    try:
        return from_mapping(RunConfig, read_mapping(path))
    except ValueError as error:
        error.add_note(f"read from {path}, which the run wrote when it started")
        raise


def export_run(run_dir: Path, target: Path, *, probe: bool | None = None) -> dict[str, Any]:
    """Writes the newest checkpoint of a run as an HF folder, from the checkpoint's files alone.

    No learner writes, and no GPU is needed. The weights pass through memory one by one. The folder is read
    back and compared with them.

    probe: also starts the learner that wrote the checkpoint, and compares its log-probs with those of
    transformers' own forward over the folder. None: where that is cheap, on a CPU with a model of up to
    `SMALL_BYTES`.

    Returns folder, step, number of tensors, and with `probe` the mean |difference| in nats. Raises ValueError
    when there is no checkpoint or `target` is in use, and WeightSyncError when the folder is not the
    learner's model.
    """
    config = run_config_of(run_dir)
    checkpoint = CheckpointStore(run_dir, config.checkpoint.keep).newest()
    if checkpoint is None:
        raise ValueError(f"run {run_dir} has no checkpoint: set checkpoint.every or let it finish")
    model = ensure_model(config.model)
    weights = stored_weights(config.learner, str(model), checkpoint.learner)
    tensors = write_hf_folder(weights, Path(model), target.resolve())
    done: dict[str, Any] = {"folder": str(target), "step": checkpoint.step, "tensors": tensors}
    if probe is None:
        size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        probe = size <= SMALL_BYTES and resolve_device(config.cluster) == "cpu"
    if probe:
        done["mean_abs"] = _probe(config, run_dir, checkpoint, str(model), target.resolve())
    return done


def _probe(config: RunConfig, run_dir: Path, checkpoint: Checkpoint, model: str, folder: Path) -> float:
    """`check_export` with the learner of the run, started and loaded for it."""
    config = replace(
        config,
        rollout=replace(config.rollout, engines=1),
        cluster=replace(config.cluster, colocated=False, in_process=False, nodes=None),
    )
    device = resolve_device(config.cluster)
    with Processes(config, model, device, run_dir, check_model(config, model), engines=False) as processes:
        learner = processes.learner()
        learner.start()
        learner.load(checkpoint.learner, checkpoint.state["policy_version"])
        return check_export(learner, config, folder)


def check_export(learner: LearnerGroup, config: RunConfig, folder: Path) -> float:
    """Mean |difference| in nats between the learner's log-probs and transformers' over an exported folder.

    The tokens are random, so that no prompt is needed. WeightSyncError when the mean passes
    rollout.weight_sync.probe_tolerance (null: what the precision explains) or transformers reads the folder
    otherwise; the folder is then moved to a name that ends in .refused, where nobody takes it for a model.
    """
    vocabulary = read_shape(folder).vocab
    length = min(PROBE_TOKENS, config.learner.token_budget)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (PROBE_SEQUENCES, length))
    sequences = [(row, 0) for row in tokens]
    ours = learner_logprobs(
        learner,
        sequences,
        replicas=config.learner.data_parallel,
        token_budget=config.learner.token_budget,
    )
    tolerance = config.rollout.weight_sync.probe_tolerance
    try:
        mean, _ = probe_folder(
            folder,
            sequences,
            ours,
            tolerance if tolerance is not None else LEVELS[config.learner.precision].unknown_stop,
            temperature=config.rollout.temperature,
            dtype=DTYPES[config.learner.precision],
        )
    except WeightSyncError:
        folder.rename(folder.with_name(f"{folder.name}.refused"))
        raise
    return mean
