"""megatron-core's config, whose GPU settings are validated on any machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron import model
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.learners.megatron.model import transformer_config
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

MODEL = from_hf(QWEN3_30B)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"recompute": "full", "recompute_num_layers": 4},
        {"recompute": "selective"},
        {"recompute": "selective", "grouped_gemm": False},
        {"token_dispatcher": "flex"},
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        {"optimizer_cpu_offload": True},
        {"aux_loss_coef": 1e-3},
        {"expert_bias": True},
        {"router_dtype": "fp64"},
        {"virtual_stages": 3, "pipeline_parallel": 4},
    ],
)
def test_gpu_settings_of_qwen3_30b_are_valid_without_a_gpu(knobs: dict) -> None:
    config = MegatronConfig(**{"tensor_parallel": 2, "expert_parallel": 8, "context_parallel": 2} | knobs)
    layout = check_layout(config, MODEL, 64)
    check_knobs(LearnerConfig(backend="megatron", world_size=64, megatron=config), gpu=True)
    built = transformer_config(MODEL, layout, config, "bf16", gpu=True)
    assert built.moe_router_dtype == knobs.get("router_dtype", "fp32")
    assert built.moe_grouped_gemm == knobs.get("grouped_gemm", True)
    assert built.moe_token_dispatcher_type == knobs.get("token_dispatcher", "alltoall")
    assert built.moe_router_enable_expert_bias == knobs.get("expert_bias", False)
    assert built.moe_aux_loss_coeff == knobs.get("aux_loss_coef", 0.0)
    assert built.recompute_granularity == {"none": None}.get(config.recompute, config.recompute)
    assert not built.moe_router_fusion
    assert not built.deterministic_mode
    assert built.calculate_per_token_loss


def test_the_deterministic_mode_is_megatrons_and_permutes_in_torch(monkeypatch) -> None:
    config = MegatronConfig(expert_parallel=8)
    layout = check_layout(config, MODEL, 8)
    built = transformer_config(MODEL, layout, config, "bf16", gpu=True, deterministic=True)
    assert built.deterministic_mode
    assert not (built.cross_entropy_loss_fusion)
    assert not (built.gradient_accumulation_fusion)
    monkeypatch.setattr(model, "transformer_engine_version", lambda: "2.11.0")
    for on in (False, True):
        settings = model._moe_settings(MODEL, config, True, on)
        assert settings["moe_permute_fusion"] is not on
    seen = []
    monkeypatch.setattr(model, "_moe_settings", lambda *told: seen.append(told) or {})
    monkeypatch.setattr(model, "TransformerConfig", lambda **given: SimpleNamespace(**given))
    made = transformer_config(MODEL, layout, config, "bf16", gpu=True, deterministic=True)
    assert (made.deterministic_mode, seen) == (True, [(MODEL, config, True, True)])
