"""A run's checkpoint as an HF folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import from_mapping, read_mapping
from gspo_dist.trainer import export_probe
from gspo_dist.trainer.setup.factories import stored_weights
from gspo_dist.weights.export import write_hf_folder


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


def export_run(run_dir: Path, target: Path, *, probe: bool = True) -> dict[str, Any]:
    """Writes the newest checkpoint of a run as an HF folder, from the checkpoint's files alone.

    No learner is started and no GPU is needed. The weights pass through memory one by one. The folder is
    read back and compared with them. Then transformers opens it, and its log-probs are compared with those
    that the learner gave when it saved.

    probe: False leaves out the last, for which the host must hold the model. It is left out too where the
    host has no room for it, or the checkpoint is of a version that kept no log-probs.

    Returns folder, step, number of tensors, and the mean |difference| in nats as `mean_abs` or, as
    `not_compared`, why there is none. Raises ValueError when there is no checkpoint or `target` is in use,
    and WeightSyncError when the folder is not the learner's model.
    """
    config = run_config_of(run_dir)
    checkpoint = CheckpointStore(run_dir, config.checkpoint.keep).newest()
    if checkpoint is None:
        raise ValueError(f"run {run_dir} has no checkpoint: set checkpoint.every or let it finish")
    model, folder = ensure_model(config.model), target.resolve()
    weights = stored_weights(config.learner, str(model), checkpoint.learner)
    tensors = write_hf_folder(weights, Path(model), folder)
    done: dict[str, Any] = {"folder": str(target), "step": checkpoint.step, "tensors": tensors}
    taken = checkpoint.state.get("export_probe")
    if not probe:
        done["not_compared"] = "as asked"
    elif taken is None:
        done["not_compared"] = "the checkpoint has none"
    elif not export_probe.has_room(folder):
        done["not_compared"] = "the model needs more than half of this host's free memory"
    else:
        done["mean_abs"] = export_probe.compare(taken, config, folder)
    return done
