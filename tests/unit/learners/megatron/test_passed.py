"""Fields that are passed on to megatron-core: which, and that they arrive."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from gspo_dist.config import LearnerConfig, MegatronConfig
from gspo_dist.learners.megatron import model as builder
from gspo_dist.learners.megatron import optimizer as optim
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.learners.megatron.passed import SECTIONS, check_passed
from gspo_dist.learners.passed import fields_of
from tests.unit.learners.megatron.qwen3 import QWEN3_30B

MODEL = from_hf(QWEN3_30B)


def learner(**megatron: Any) -> LearnerConfig:
    config = MegatronConfig(**{"tensor_parallel": 2, "expert_parallel": 8} | megatron)
    return LearnerConfig(backend="megatron", world_size=64, precision="bf16", megatron=config)


def transformer(config: LearnerConfig) -> Any:
    layout = check_layout(config.megatron, MODEL, 64)
    return builder.transformer_config(MODEL, layout, config.megatron, "bf16", gpu=True)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"transformer": {"recompute_module": ["moe"]}},
            r"learner\.megatron\.transformer must hold names that megatron-core's TransformerConfig has: got "
            r"'recompute_module'; did you mean 'recompute_modules'\?",
        ),
        ({"ddp": {"bucket_sise": 1}}, r"got 'bucket_sise'; did you mean 'bucket_size'\?"),
        (
            {"optimizer": {"pin_grads": False}},
            r"OptimizerConfig has: got 'pin_grads'; did you mean 'pin_cpu_g",
        ),
        ({"transformer": {"_cpu_offloading_context": None}}, r"names that megatron-core's"),
        (
            {"transformer": {"tensor_model_parallel_size": 4}},
            r"must leave alone what gspo_dist sets itself: got tensor_model_parallel_size=4; set "
            r"learner\.megatron\.tensor_parallel",
        ),
        ({"transformer": {"num_layers": 2}}, r"got num_layers=2; config\.json of model\.path says it"),
        ({"transformer": {"hidden_dropout": 0.1}}, r"got hidden_dropout=0\.1; .* no noise"),
        ({"ddp": {"average_in_collective": True}}, r"denominators are global"),
        ({"optimizer": {"adam_beta1": 0.8}}, r"adam_beta1=0\.8; set learner\.optimizer\.betas"),
        (
            {"recompute": "selective", "transformer": {"recompute_modules": "moe"}},
            r"transformer\.recompute_modules must be Optional\[List\[str\]\]: got 'moe'",
        ),
        (
            {"transformer": {"attention_backend": "flashy"}},
            r"must be AttnBackend, by name: flash, fused, unfused, local, auto: got 'flashy'",
        ),
        ({"optimizer": {"exp_avg_dtype": "bf16"}}, r"must be torch\.dtype, by name: float32, bfloat16"),
        ({"transformer": {"recompute_modules": ["moe"]}}, r"recompute_modules needs .*=selective: got none"),
        (
            {"transformer": {"recompute_method": "block"}},
            r"recompute_method needs .*recompute=full: got none",
        ),
        (
            {"optimizer": {"optimizer_offload_fraction": 0.5}},
            r"needs learner\.megatron\.optimizer_cpu_offload",
        ),
    ],
)
def test_what_cannot_be_passed_on_is_refused_with_the_way_out(knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_knobs(learner(**knobs), gpu=True)


def test_every_field_that_is_passed_on_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)
    config = learner(
        recompute="selective",
        optimizer_cpu_offload=True,
        transformer={
            "recompute_modules": ["moe", "layernorm"],
            "attention_backend": "fused",
            "apply_rope_fusion": False,
            "cp_comm_type": "a2a",
        },
        ddp={"bucket_size": 1234},
        optimizer={"exp_avg_sq_dtype": "bfloat16", "optimizer_offload_fraction": 0.5},
    )
    check_knobs(config, gpu=True)
    built = transformer(config)
    assert built.recompute_modules == ["moe", "layernorm"]
    assert builder.recomputes_routers(built)  # replay must know that routers run again
    assert built.attention_backend is AttnBackend.fused
    assert (built.apply_rope_fusion, built.cp_comm_type) == (False, "a2a")
    assert optim.ddp_config(config).bucket_size == 1234
    assert optim.ddp_config(config).grad_reduce_in_fp32
    made = optim.optimizer_config(config)
    assert (made.exp_avg_dtype, made.exp_avg_sq_dtype) == (torch.float32, torch.bfloat16)
    assert made.optimizer_offload_fraction == 0.5


def test_stages_may_have_different_numbers_of_layers() -> None:
    """48 layers: 12 in the first stage and 18 in each of the other two. 5 stages would not divide them."""
    uneven = {"num_layers_in_first_pipeline_stage": 12}
    built = transformer(learner(pipeline_parallel=4, tensor_parallel=1, transformer=uneven))
    assert built.num_layers_in_first_pipeline_stage == 12
    with pytest.raises(
        ValueError, match=r"megatron-core refuses learner\.megatron\.transformer=.*; unset it"
    ):
        transformer(learner(pipeline_parallel=4, tensor_parallel=1, transformer={uneven.popitem()[0]: 11}))


CONSTRUCTED: dict[str, tuple[str, str, Callable[[LearnerConfig], Any]]] = {
    "transformer": ("model", "TransformerConfig", transformer),
    "ddp": ("optimizer", "DistributedDataParallelConfig", optim.ddp_config),
    "optimizer": ("optimizer", "MegatronOptimizerConfig", optim.optimizer_config),
}
OVERRIDABLE = {
    "transformer": {
        *("gradient_accumulation_fusion", "masked_softmax_fusion", "persist_layer_norm", "apply_rope_fusion"),
        *("bias_activation_fusion", "bias_dropout_fusion", "moe_permute_fusion", "recompute_modules"),
        "moe_flex_dispatcher_backend",
    },
    "ddp": set(),
    "optimizer": {"optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"},
}
"""What gspo_dist gives a value and leaves to the user: speed and memory."""


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_what_gspo_dist_sets_itself_is_the_users_only_where_it_decides_speed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cls, make = CONSTRUCTED[name]
    owner = {"model": builder, "optimizer": optim}[module]
    real, seen = getattr(owner, cls), dict[str, Any]()

    def spy(**settings: Any) -> Any:
        seen.update(settings)
        return real(**settings)

    monkeypatch.setattr(owner, cls, spy)
    make(learner(recompute="selective"))
    assert len(seen) > 5
    assert set(seen) - set(SECTIONS[name].own) == OVERRIDABLE[name] & set(seen)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_own_key_is_one_of_megatrons(name: str) -> None:
    """A key that a later version renames would be refused under the old name alone."""
    known = fields_of(SECTIONS[name].classes)
    assert known is not None
    assert set(SECTIONS[name].own) - set(known) == set()


def test_checking_imports_neither_megatron_nor_torch() -> None:
    code = (
        "import sys; from gspo_dist.config import MegatronConfig, DeepSpeedConfig\n"
        "from gspo_dist.learners.megatron.passed import check_passed\n"
        "from gspo_dist.learners.deepspeed.passed import check_passed as check_deepspeed\n"
        "check_passed(MegatronConfig(transformer={'cp_comm_type': 'p2p'}))\n"
        "check_deepspeed(DeepSpeedConfig(config={'zero_optimization': {'sub_group_size': 1}}))\n"
        "print([m for m in ('torch', 'megatron', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_passed_on_checks_nothing() -> None:
    check_passed(MegatronConfig())
