"""A run's checkpoint as an HF folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import from_mapping
from gspo_dist.trainer.setup.checks import check_model, resolve_device
from gspo_dist.trainer.setup.processes import Processes


def run_config_of(run_dir: Path) -> RunConfig:
    """The resolved configuration that a run folder was made with. Raises ValueError where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"not a run folder: {run_dir} has no config.json")
    return from_mapping(RunConfig, json.loads(path.read_text()))


def export_run(run_dir: Path, target: Path) -> dict[str, Any]:
    """Writes the newest checkpoint of a run as an HF folder, with the learner that wrote the checkpoint.

    Returns folder, step and number of tensors. Raises ValueError when there is no checkpoint, or `target`
    is in use.
    """
    config = run_config_of(run_dir)
    checkpoint = CheckpointStore(run_dir, config.checkpoint.keep).newest()
    if checkpoint is None:
        raise ValueError(f"run {run_dir} has no checkpoint: set checkpoint.every or let it finish")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"the folder to export to must be new or empty: {target} is not")
    model = str(ensure_model(config.model))
    config = replace(
        config,
        rollout=replace(config.rollout, engines=1),
        cluster=replace(config.cluster, colocated=False, in_process=False),
    )
    device = resolve_device(config.cluster)
    with Processes(config, model, device, run_dir, check_model(config, model), engines=False) as processes:
        learner = processes.learner()
        learner.start()
        learner.load(checkpoint.learner, checkpoint.state["policy_version"])
        tensors = learner.export(Path(model), target.resolve())
    return {"folder": str(target), "step": checkpoint.step, "tensors": tensors}
