"""What each process of a run finds in its environment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.trainer.setup import processes as module
from gspo_dist.trainer.setup.processes import process_env, start_parts
from tests.unit.trainer.small import config


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr("gspo_dist.host.usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_a_cpu_run_hides_gpus_and_shares_the_cores(model, reward_file, tmp_path, four_cores):
    """Ray leaves a host's GPUs visible to actors that ask for none."""
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "learner", replace(c.learner, backend="deepspeed", world_size=2))
    object.__setattr__(c, "rollout", replace(c.rollout, engines=4))
    env = process_env(c, "cpu")
    assert env["learner"]["OMP_NUM_THREADS"] == "2"
    assert env["engine"]["OMP_NUM_THREADS"] == "1"
    assert {e["CUDA_VISIBLE_DEVICES"] for e in env.values()} == {""}
    assert env["learner"]["DS_ACCELERATOR"] == "cpu"


def test_threads_that_are_asked_for_are_given(model, reward_file, tmp_path, four_cores):
    c = config(model, reward_file, tmp_path, "learner.threads=3", "rollout.threads=7")
    env = process_env(c, "cpu")
    assert (env["learner"]["OMP_NUM_THREADS"], env["engine"]["OMP_NUM_THREADS"]) == ("3", "7")


def test_a_gpu_run_hides_nothing(model, reward_file, tmp_path):
    env = process_env(config(model, reward_file, tmp_path), "cuda")
    assert all("CUDA_VISIBLE_DEVICES" not in e for e in env.values())


def test_models_are_not_looked_up_in_a_hub_unless_the_user_says_so(model, reward_file, tmp_path, monkeypatch):
    c = config(model, reward_file, tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert process_env(c, "cpu")["engine"]["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert process_env(c, "cpu")["engine"]["HF_HUB_OFFLINE"] == "0"


def test_in_process_parts_end_together(model, reward_file, tmp_path, monkeypatch):
    ended = []
    for name in ("LocalLearnerGroup", "LocalRolloutPool", "LocalRewardPool"):
        monkeypatch.setattr(
            getattr(module, name), "close", lambda self, _name=name: ended.append(_name), raising=True
        )
    parts = start_parts(config(model, reward_file, tmp_path), str(model), "cpu", tmp_path, 2)
    assert parts.info.moe_layers == 2
    parts.release()
    assert sorted(ended) == ["LocalLearnerGroup", "LocalRewardPool", "LocalRolloutPool"]
