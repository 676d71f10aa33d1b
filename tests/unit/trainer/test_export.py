"""Laws of an export: the folder computes what the learner computes, or nobody finds it under its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_dist.config import LearnerConfig, RunConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.group import LocalLearnerGroup
from gspo_dist.trainer.export import check_export
from gspo_dist.weights.tolerance import LEVELS
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.weights.tiny_models import make


def exported(tmp_path, family):
    """A learner whose weights have moved, its configuration, and the folder that it exported."""
    make(tmp_path / "start", family)
    config = RunConfig(learner=LearnerConfig(backend="eager", precision="fp32", world_size=1))
    config = replace(config, rollout=replace(config.rollout, temperature=0.7))
    learner = EagerLearner(config.learner, tmp_path / "start", total_steps=1, temperature=0.7)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.mul_(1.1)
    group = LocalLearnerGroup(learner)
    group.export(tmp_path / "start", tmp_path / "out")
    return group, config, tmp_path / "out"


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
