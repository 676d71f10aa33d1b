"""The rules of a run folder: when it starts over, when it is resumed, and when it is refused."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import Checkpoint
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import read_mapping, to_mapping
from gspo_dist.metrics.jsonl import write_json

FIXED = {
    "": ("seed", "mini_batches", "model", "objective", "data", "reward"),
    "learner": ("backend", "precision", "optimizer"),
    "rollout": (
        "precision",
        "prompts_per_step",
        "group_size",
        "max_prompt_tokens",
        "max_completion_tokens",
        "temperature",
    ),
}
"""What a resumed run may not change; steps, layout, logging and the rest it may."""


def prepare_folder(run_dir: Path, config: RunConfig, checkpoint: Checkpoint | None) -> None:
    """Readies the run folder, and writes config.json and run_id.

    A folder without checkpoints starts over (its metrics are cut); one with checkpoints is resumed with the
    settings that made it. Raises ValueError otherwise, because nothing that was finished is lost.
    """
    if checkpoint is None and any(run_dir.glob("checkpoints/step-*/manifest.json")):
        raise ValueError(
            f"run_dir {run_dir} holds checkpoints of an earlier run and checkpoint.resume is false: choose a new "
            "run_dir, or set checkpoint.resume=true"
        )
    if checkpoint is not None and (run_dir / "config.json").is_file():
        changed = changed_settings(read_mapping(run_dir / "config.json"), to_mapping(config))
        if changed:
            raise ValueError(
                f"run_dir {run_dir} was made with other settings: {', '.join(changed)}; restore them, or choose a "
                "new run_dir"
            )
    write_json(run_dir / "config.json", to_mapping(config))
    identity = run_dir / "run_id"
    if checkpoint is None or not identity.is_file():
        identity.write_text(uuid.uuid4().hex[:12])


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fixed settings in which two resolved configurations differ."""
    changed = []
    for section, names in FIXED.items():
        before, after = (old.get(section, {}), new[section]) if section else (old, new)
        changed += [f"{section}.{n}".lstrip(".") for n in names if before.get(n) != after[n]]
    return changed
