"""The log-probs that a checkpoint keeps: an exported folder must give them again, or nobody finds it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_dist.config import LearnerConfig, RolloutConfig, RunConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.group import LocalLearnerGroup
from gspo_dist.trainer import export_probe
from gspo_dist.weights.tolerance import LEVELS
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.weights.tiny_models import make


def config_of():
    config = RunConfig(learner=LearnerConfig(backend="eager", precision="fp32", world_size=1))
    return replace(config, rollout=replace(config.rollout, temperature=0.7))


def exported(tmp_path, family):
    """A learner whose weights have moved, its configuration, and the folder that it exported."""
    make(tmp_path / "start", family)
    config = config_of()
    learner = EagerLearner(config.learner, tmp_path / "start", total_steps=1, temperature=0.7)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.mul_(1.1)
    group = LocalLearnerGroup(learner)
    group.export(tmp_path / "start", tmp_path / "out")
    return group, config, tmp_path / "out"


def check_export(group, config, folder) -> float:
    """As a checkpoint keeps it: through a file of JSON."""
    taken = json.loads(json.dumps(export_probe.take(group, config, folder.parent / "start")))
    assert [len(row) for row in taken] == [47, 47]
    return export_probe.compare(taken, config, folder)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_a_true_export_agrees_to_rounding(family, tmp_path) -> None:
    group, config, folder = exported(tmp_path, family)
    assert check_export(group, config, folder) < 1e-6
    assert folder.is_dir()


def test_an_export_with_other_weights_is_refused_and_moved_aside(tmp_path) -> None:
    group, config, folder = exported(tmp_path, "qwen3_moe")
    file = folder / "model-00001.safetensors"
    held = load_file(file)
    held["lm_head.weight"] = held["lm_head.weight"].flip(0).contiguous()
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(WeightSyncError, match=r"the exported folder out and learner disagree"):
        check_export(group, config, folder)
    assert not folder.exists()
    assert (tmp_path / "out.refused/config.json").is_file()


def test_an_exports_tolerance_is_the_users_number_or_follows_the_precision(tmp_path, monkeypatch) -> None:
    group, config, folder = exported(tmp_path, "qwen3_moe")
    sync = replace(config.rollout.weight_sync, probe_tolerance=1e-15)
    strict = replace(config, rollout=replace(config.rollout, weight_sync=sync))
    monkeypatch.setitem(LEVELS, "bf16", replace(LEVELS["bf16"], unknown_stop=1e-15))
    assert check_export(group, config, folder) > 1e-15  # fp32's limit, which is as it was
    with pytest.raises(WeightSyncError, match="probe_tolerance is 1e-15"):
        check_export(group, strict, folder)


def test_a_folder_is_computed_in_the_learners_own_precision(tmp_path, monkeypatch) -> None:
    """In fp32 a bf16 policy gives other log-probs, and a wrong folder could hide in the difference."""
    asked = []

    def probe_folder(folder, sequences, taken, tolerance, *, temperature, dtype):
        asked.append((temperature, dtype))
        return 0.0, 0.0

    monkeypatch.setattr(export_probe, "probe_folder", probe_folder)
    make(tmp_path / "out", "qwen3_moe")
    config = config_of()
    for precision in ("bf16", "fp32"):
        own = replace(config, learner=replace(config.learner, precision=precision))
        export_probe.compare([[0.0]], own, tmp_path / "out")
    assert asked == [(0.7, torch.bfloat16), (0.7, torch.float32)]


def test_the_tokens_of_a_probe_are_the_same_ones_for_the_same_vocabulary():
    rows = export_probe.sequences(config_of(), 50)
    assert [(len(row), prompt) for row, prompt in rows] == [(48, 0), (48, 0)]
    again = export_probe.sequences(config_of(), 50)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(rows, again, strict=True))
    everything = np.concatenate([row for row, _ in rows])
    assert 0 <= everything.min() < 10
    assert 40 <= everything.max() < 50
    assert not np.array_equal(rows[0][0], rows[1][0])


def test_a_probe_fits_one_forward_pass():
    short = RunConfig(
        learner=LearnerConfig(forward_token_budget=31),
        rollout=RolloutConfig(max_prompt_tokens=11, max_completion_tokens=20),
    )
    assert [len(row) for row, _ in export_probe.sequences(short, 50)] == [31, 31]


def test_a_model_may_take_half_of_the_hosts_free_memory(tmp_path, monkeypatch):
    for name in ("a.safetensors", "b.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(500))
    monkeypatch.setattr(export_probe, "usable_memory", lambda: (1, 2000))
    assert export_probe.has_room(tmp_path)
    monkeypatch.setattr(export_probe, "usable_memory", lambda: (9999, 1998))
    assert not export_probe.has_room(tmp_path)
