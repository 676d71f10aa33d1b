"""Laws of an export: the folder computes what the learner computes, or nobody finds it under its name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.config import LearnerConfig, ModelConfig, RolloutConfig, RunConfig
from gspo_dist.config.mapping import to_mapping
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.group import LocalLearnerGroup
from gspo_dist.trainer import export, export_probe
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.trainer.small import config, go
from tests.unit.weights.tiny_models import make


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder with one checkpoint of an eager learner that has trained; the learner itself."""
    make(tmp_path / "start", "qwen3_moe")
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path / "start")),
        learner=LearnerConfig(backend="eager", precision="bf16", world_size=1),
        rollout=RolloutConfig(max_prompt_tokens=8, max_completion_tokens=16),
    )
    learner = EagerLearner(config.learner, tmp_path / "start", total_steps=1)
    for parameter, master in zip(learner.parameters, learner.masters, strict=True):
        master.mul_(1.1)
        parameter.data.copy_(master)
    folder = tmp_path / "run"
    store = CheckpointStore(folder, 1)
    partial = store.begin(3)
    learner.save(partial / "learner")
    group = LocalLearnerGroup(learner)
    state = {"policy_version": 3, "export_probe": export_probe.take(group, config, tmp_path / "start")}
    store.commit(partial, 3, state)
    (folder / "config.json").write_text(json.dumps(to_mapping(config)))
    return folder, group


def test_a_run_is_exported_from_its_files_without_a_learner(run_dir, tmp_path) -> None:
    """Bit for bit what the learner itself exports."""
    folder, group = run_dir
    done = export.export_run(folder, tmp_path / "out")
    assert done.pop("mean_abs") < 5e-4  # bf16 rounds
    assert done == {"folder": str(tmp_path / "out"), "step": 3, "tensors": 45}
    group.export(tmp_path / "start", tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model-00001.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(ours[name], tensor), name
    with pytest.raises(ValueError, match="must be new or empty"):
        export.export_run(folder, tmp_path / "out")


def test_files_that_hold_another_policy_than_the_one_that_saved_are_refused(run_dir, tmp_path) -> None:
    """Every name, shape and checksum of such a folder is right."""
    folder, group = run_dir
    head = dict(group.learner.policy.named_parameters())["hf.lm_head.weight"]
    head.data.copy_(200 * head.flip(0))
    group.learner.masters = [p.detach().float().clone() for p in group.learner.parameters]
    checkpoint = CheckpointStore(folder, 1).newest()
    shutil.rmtree(checkpoint.learner)
    group.learner.save(checkpoint.learner)
    with pytest.raises(WeightSyncError, match="the exported folder out and learner disagree"):
        export.export_run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.refused").is_dir()


def test_why_log_probs_were_not_compared_is_told(run_dir, tmp_path, monkeypatch) -> None:
    folder, _ = run_dir
    assert export.export_run(folder, tmp_path / "a", probe=False)["not_compared"] == "as asked"
    bytes_of_model = (tmp_path / "a" / "model-00001.safetensors").stat().st_size
    monkeypatch.setattr(export_probe, "usable_memory", lambda: (1 << 40, 2 * bytes_of_model - 2))
    assert "half of this host's free memory" in export.export_run(folder, tmp_path / "b")["not_compared"]
    monkeypatch.setattr(export_probe, "usable_memory", lambda: (1 << 40, 2 * bytes_of_model))
    assert "mean_abs" in export.export_run(folder, tmp_path / "c")
    checkpoint = CheckpointStore(folder, 1).newest()
    (file,) = [p for p in checkpoint.folder.rglob("*.json") if "export_probe" in p.read_text()]
    file.write_text(file.read_text().replace("export_probe", "of_an_older_version"))
    assert export.export_run(folder, tmp_path / "d")["not_compared"] == "the checkpoint has none"


def test_a_folder_of_something_else_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"not a run folder: {tmp_path} has no config\.json"):
        export.export_run(tmp_path, tmp_path / "out")


def test_a_configuration_that_cannot_be_read_is_told_with_its_file(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"steps": "many"}')
    with pytest.raises(ValueError, match="steps") as error:
        export.export_run(tmp_path, tmp_path / "out")
    assert error.value.__notes__ == [f"read from {tmp_path}/config.json, which the run wrote when it started"]


def test_a_run_without_a_checkpoint_says_so(run_dir, tmp_path) -> None:
    shutil.rmtree(run_dir[0] / "checkpoints")
    with pytest.raises(ValueError, match=r"has no checkpoint: set checkpoint\.every"):
        export.export_run(run_dir[0], tmp_path / "out")


def test_what_a_run_saves_is_exported_and_gives_its_learners_log_probs(model, reward_file, tmp_path) -> None:
    go(config(model, reward_file, tmp_path / "run", "steps=1", "checkpoint.every=1"))
    done = export.export_run(tmp_path / "run", tmp_path / "out")
    assert done["step"] == 1
    assert 0 < done["mean_abs"] < 1e-5
