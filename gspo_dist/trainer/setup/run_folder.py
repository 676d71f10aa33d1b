"""The rules of a run folder: when it starts over, when it is resumed, and when it is refused."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_dist.checkpoint import Checkpoint
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import leaves, read_mapping, to_mapping
from gspo_dist.files import write_text
from gspo_dist.learners.state_files import check_resume as check_state
from gspo_dist.metrics.jsonl import write_json

log = logging.getLogger(__name__)

MATHEMATICS = (
    "seed",
    "mini_batches",
    "model",
    "objective",
    "data",
    "reward",
    "environment",
    "learner.precision",
    "learner.optimizer",
    "learner.fp32_head",
    "learner.deepspeed.config",
    "learner.megatron.transformer",
    "learner.megatron.optimizer",
    "rollout.engine",
    "rollout.precision",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_prompt_tokens",
    "rollout.max_completion_tokens",
    "rollout.length_schedule",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.steps_ahead",
    "rollout.ticks_per_step",
)
"""Settings and sections that decide what a step computes. A resume with another value would join two
different runs into one curve, so it is refused unless `checkpoint.accept` names it.
"""

OPERATIONS = (
    "model.cache_dir",
    "data.heldout",
    "reward.workers",
    "reward.timeout_s",
    "environment.workers",
    "environment.timeout_s",
    "learner.megatron.transformer.recompute_modules",
    "learner.megatron.transformer.recompute_method",
    "learner.megatron.transformer.cpu_offloading",
    "learner.megatron.transformer.cpu_offloading_num_layers",
    "learner.megatron.transformer.fine_grained_activation_offloading",
    "learner.megatron.transformer.offload_modules",
    "learner.megatron.transformer.num_layers_in_first_pipeline_stage",
    "learner.megatron.transformer.num_layers_in_last_pipeline_stage",
    "learner.megatron.optimizer.optimizer_offload_fraction",
    "learner.megatron.optimizer.overlap_cpu_optimizer_d2h_h2d",
)
"""Inside those sections, what only decides how the work is done."""

FORMATS = ("learner.backend",)
"""What decides how a checkpoint is written. No acceptance makes another backend read it."""


def prepare_folder(run_dir: Path, config: RunConfig, checkpoint: Checkpoint | None) -> None:
    """Readies the run folder, and writes config.json and run_id.

    A folder without checkpoints starts over (its metrics are cut). One with checkpoints is resumed with the
    settings that made it. Raises ValueError otherwise, because nothing that was finished is lost.
    """
    if checkpoint is None:
        if any(run_dir.glob("checkpoints/step-*/manifest.json")):
            raise ValueError(
                f"run_dir {run_dir} holds checkpoints of an earlier run and checkpoint.resume is false: "
                "choose a new run_dir, or set checkpoint.resume=true"
            )
    else:
        check_resume(run_dir, config, checkpoint)
    write_json(run_dir / "config.json", to_mapping(config))
    identity = run_dir / "run_id"
    if checkpoint is None or not identity.is_file():
        write_text(identity, uuid.uuid4().hex[:12])


def check_resume(run_dir: Path, config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises ValueError, naming keys and both values, when the run in `run_dir` cannot go on
    as `config` says.
    """
    check_state(checkpoint.learner, config.learner)
    if config.steps < checkpoint.step:
        raise ValueError(
            f"steps must be at least those that are done: got {config.steps}, and {checkpoint.folder} is "
            f"after step {checkpoint.step}; raise steps, or choose a new run_dir"
        )
    path = run_dir / "config.json"
    if not path.is_file():
        return
    old, new = read_mapping(path), to_mapping(config)
    foreign = changed_settings(old, new, FORMATS)
    if foreign:
        raise ValueError(
            f"run_dir {run_dir} has checkpoints of another learner: {_told(foreign)}; restore it, or "
            "choose a new run_dir (gspo export makes a model folder of this one to start from)"
        )
    changed = {
        key: values
        for key, values in changed_settings(old, new, MATHEMATICS).items()
        if not _within(key, OPERATIONS)
    }
    barred = {key: values for key, values in changed.items() if not _within(key, config.checkpoint.accept)}
    if barred:
        raise ValueError(
            f"run_dir {run_dir} was made with other settings: {_told(barred)}; restore them, choose a "
            f"new run_dir, or let the steps to come differ: 'checkpoint.accept=[{','.join(barred)}]'"
        )
    if changed:
        log.warning("resuming with other settings, as accepted: %s", _told(changed))


def changed_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], sections: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """The settings within `sections` in which two resolved configurations differ: key -> (old, new).

    A key that the old configuration does not know was added by a later version. It had its default then, so
    it counts as changed only when it has another value now.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    defaults = dict(leaves(to_mapping(RunConfig())))
    return {
        key: (before.get(key, defaults.get(key)), after.get(key))
        for key in sorted({*before, *after})
        if _within(key, sections) and before.get(key, defaults.get(key)) != after.get(key)
    }


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _told(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} (was {old!r}, now {new!r})" for key, (old, new) in changed.items())
