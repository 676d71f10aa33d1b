"""Cheap checks before any process starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gspo_dist.config import ClusterConfig, RunConfig
from gspo_dist.trainer.setup.checks import check_backend, check_model, resolve_device, resolve_transport
from tests.unit.trainer.small import config


def changed(c: RunConfig, **sections) -> RunConfig:
    return replace(c, **{name: replace(getattr(c, name), **values) for name, values in sections.items()})


@pytest.mark.parametrize(
    ("device", "engine", "cluster", "expected"),
    [
        ("cuda", "vllm", {}, "nccl"),
        ("cpu", "vllm", {}, "shm"),
        ("cuda", "reference", {}, "shm"),
        ("cuda", "vllm", {"in_process": True}, "shm"),
        ("cuda", "vllm", {"colocated": True}, "shm"),
    ],
)
def test_auto_transport(model, reward_file, tmp_path, device, engine, cluster, expected):
    c = config(model, reward_file, tmp_path)
    c = changed(c, rollout={"engine": engine})
    # the cross-checks of a whole configuration are config's own; here only the choice is of interest
    object.__setattr__(c, "cluster", replace(c.cluster, **({"in_process": False} | cluster)))
    assert resolve_transport(c, device) == expected


def test_nccl_is_refused_where_it_cannot_work(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "rollout.weight_sync.transport=nccl")
    with pytest.raises(ValueError, match=r"transport=nccl needs .* got device cpu, .*; use auto or shm"):
        resolve_transport(c, "cpu")


def test_the_models_context_holds_prompt_and_completion(model, reward_file, tmp_path):
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    fits = f"rollout.max_completion_tokens={context - 16}"
    budget = f"learner.token_budget={context + 8}"
    assert check_model(config(model, reward_file, tmp_path, fits, budget), str(model)) == 2
    over = f"rollout.max_completion_tokens={context - 15}"
    with pytest.raises(ValueError, match=f"must fit the model's context: got {context + 1} for {context}"):
        check_model(config(model, reward_file, tmp_path, over, budget), str(model))


def test_experts_must_divide_over_the_ranks(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    c = changed(c, cluster={"in_process": False})
    learner = replace(c.learner, backend="deepspeed", world_size=3)
    learner = replace(learner, deepspeed=replace(learner.deepspeed, expert_parallel=3))
    object.__setattr__(c, "learner", learner)
    with pytest.raises(ValueError, match=r"expert_parallel must divide num_experts: got 3 and 8; try 1"):
        check_backend(c, "cpu", str(model))


def test_replay_needs_experts(model, reward_file, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    hf = json.loads((model / "config.json").read_text())
    hf |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 16}
    for key in [k for k in hf if "expert" in k or k.startswith(("moe", "router"))]:
        del hf[key]
    (dense / "config.json").write_text(json.dumps(hf))
    for path in model.iterdir():
        if path.name != "config.json":
            (dense / path.name).symlink_to(path)
    c = config(model, reward_file, tmp_path / "run", "objective=grpo_r3")
    with pytest.raises(
        ValueError, match=r"routing_replay=r3 needs a mixture-of-experts model: Qwen3ForCausalLM"
    ):
        check_model(c, str(dense))


def test_a_gpu_that_is_not_there_is_refused():
    assert resolve_device(ClusterConfig(in_process=True)) == "cpu"
    with pytest.raises(ValueError, match=r"cluster\.device=cuda needs a GPU: torch sees none on this host"):
        resolve_device(ClusterConfig(in_process=True, device="cuda"))
