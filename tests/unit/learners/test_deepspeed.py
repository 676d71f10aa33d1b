"""What the DeepSpeed learner refuses, tells DeepSpeed, and names: no process group needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.config import DeepSpeedConfig, LearnerConfig, OptimizerConfig
from gspo_dist.learners.deepspeed.config import check, engine_config
from gspo_dist.learners.deepspeed.export import hf_name
from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner
from gspo_dist.learners.deepspeed.load import Checkpoint, copy_into
from gspo_dist.models.shape import ModelShape, shape_from_config
from gspo_dist.routing.deepspeed import find_routers, gate_weights


def shape(model: PretrainedConfig) -> ModelShape:
    return shape_from_config(model.to_dict())


MOE = shape(Qwen3MoeConfig(num_experts=12, norm_topk_prob=True))


def config(world_size: int = 4, precision: str = "fp32", **ds: object) -> LearnerConfig:
    return LearnerConfig(
        backend="deepspeed",
        world_size=world_size,
        precision=precision,
        deepspeed=DeepSpeedConfig(**ds),
        optimizer=OptimizerConfig(lr=3e-6, grad_clip=0.7),
    )


def tiny() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        )
    )


def files(folder: Path) -> list[str]:
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())


@pytest.mark.parametrize(
    ("ds", "model", "device", "message"),
    [
        ({"offload_optimizer": True}, MOE, "cpu", "offload_optimizer needs a GPU host: got device 'cpu'"),
        ({"offload_params": True, "zero_stage": 3}, MOE, "cpu", "offload_params needs a GPU host"),
        ({"grouped_mm": True}, MOE, "cpu", "grouped_mm needs a GPU host"),
        (
            {"offload_optimizer": True, "zero_stage": 0},
            MOE,
            "cuda",
            "offload_optimizer needs zero_stage 1 to 3: got 0",
        ),
        ({"expert_parallel": 2, "zero_stage": 0}, MOE, "cpu", "expert_parallel needs zero_stage 1 to 3"),
        ({"expert_parallel": 2}, shape(Qwen3Config()), "cpu", "must be 1 for a qwen3 model: got 2"),
        ({"expert_parallel": 8}, MOE, "cpu", "must divide num_experts: got 8 and 12; try 1, 2, 4"),
    ],
)
def test_settings_that_cannot_run_are_refused(ds: dict, model: ModelShape, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config(world_size=8, **ds), model, device)


def test_settings_that_can_run_pass() -> None:
    check(config(zero_stage=3, expert_parallel=4), MOE, "cpu")
    check(config(zero_stage=3, offload_optimizer=True, offload_params=True, grouped_mm=True), MOE, "cuda")


def test_a_rank_outside_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must fit learner.world_size 4: got 0 and 2"):
        DeepSpeedLearner(config(), tmp_path, total_steps=1, rank=0, world_size=2)


def test_gradients_accumulate_and_travel_in_fp32() -> None:
    for stage in (1, 2, 3):
        out = engine_config(config(precision="bf16", zero_stage=stage), MOE)
        assert out["bf16"]["enabled"]
        assert out["data_types"]["grad_accum_dtype"] == "fp32"
        assert out["communication_data_type"] == "fp32"
        assert out["managed_gradient_accumulation"] is False
        assert out["zero_optimization"]["stage"] == stage
        assert out["gradient_clipping"] == 0.7


def test_the_reference_has_no_optimiser_and_is_sharded_as_the_policy() -> None:
    for stage, expected in ((0, 0), (1, 0), (2, 0), (3, 3)):
        ep = 2 if stage else 1
        out = engine_config(config(zero_stage=stage, expert_parallel=ep), MOE, trains=False)
        assert "optimizer" not in out
        assert out["zero_optimization"]["stage"] == expected
        assert ("expert_parallel" in out) == (ep > 1)


def test_gate_weights_are_renormalised_exactly_where_the_model_does() -> None:
    for model, norm in ((MOE, True), (shape(Qwen2MoeConfig(num_experts=12, norm_topk_prob=False)), False)):
        assert engine_config(config(expert_parallel=2), model)["expert_parallel"]["route_norm"] is norm


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        ("hf.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("hf.model.layers.3.mlp.router.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("hf.model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        (
            "hf.model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.layers.1.mlp.shared_expert.up_proj.weight",
        ),
        ("hf.model.layers.1.mlp.shared_experts_gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("hf.model.layers.2.self_attn.q_norm.weight", "model.layers.2.self_attn.q_norm.weight"),
    ],
)
def test_names_in_the_engine_become_names_in_the_file(engine: str, file: str) -> None:
    assert hf_name(engine) == file


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_parameters_filled_one_by_one_equal_the_saved_model(tmp_path: Path, shard_size: str) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (
        1 if shard_size == "1GB" else len(set(files(tmp_path)))
    )
    checkpoint = Checkpoint(tmp_path)
    for name, parameter in model.named_parameters():
        target = torch.full_like(parameter, float("nan"))
        copy_into(target, name, checkpoint)
        assert torch.equal(target, parameter), name


def test_a_weight_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for gone in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        save_file({n: t for n, t in weights.items() if n != gone}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"lacks the weights .*{gone}"):
            for name, parameter in model.named_parameters():
                copy_into(torch.empty_like(parameter), name, Checkpoint(tmp_path))


def test_gate_weights_by_hand() -> None:
    """Logits log(1, 2, 5): softmax 1/8, 2/8, 5/8; experts 2 and 0 renormalised: 5/6 and 1/6, scaled by 2."""
    router = torch.nn.Module()
    router.score_func, router.route_norm, router.route_scale = "softmax", True, 2.0
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))
    ids = torch.tensor([[2, 0]])
    torch.testing.assert_close(gate_weights(router, logits, ids), torch.tensor([[10 / 6, 2 / 6]]))
    router.route_norm = False
    torch.testing.assert_close(gate_weights(router, logits, ids), torch.tensor([[10 / 8, 2 / 8]]))
    router.score_func = "sigmoid"  # odds 1, 2, 5
    torch.testing.assert_close(gate_weights(router, logits, ids), torch.tensor([[10 / 6, 1.0]]))


def test_a_model_without_autoep_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_parallel above 1"):
        find_routers(torch.nn.Linear(2, 2))
