"""Which HF models are built, and which are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gspo_dist.learners.megatron.architecture import SUPPORTED, from_hf, read_architecture
from tests.unit.learners.megatron.qwen3 import QWEN3_30B
from tests.unit.routing.families import FAMILIES, SIZES


def test_both_spellings_of_rope_read_alike() -> None:
    model = from_hf(QWEN3_30B)
    new = {k: v for k, v in QWEN3_30B.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert from_hf(new) == model
    assert model.rope_theta == 1e6


def test_moe_layers_follow_step_and_exceptions() -> None:
    config = QWEN3_30B | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert from_hf(config).expert_layers == (False, True, False, False, False, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"'GPT2LMHeadModel': it builds Qwen3MoeForCausalLM, Qwen2MoeForCausalLM, Mixtral",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_type 'default' only: got 'yarn'"),
        ({"attention_bias": True}, r"no attention_bias"),
        (
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 30},
            r"full attention only: .* sliding_attention in 18 of 48 layers, the first of them layer 30",
        ),
        ({"model_type": "qwen3"}, r"must give model_type 'qwen3_moe' for Qwen3MoeForCausalLM: got 'qwen3'"),
        ({"hidden_act": "gelu"}, r"hidden_act 'silu' only: got 'gelu'"),
        ({"mlp_bias": True}, r"no attention_bias or mlp_bias for Qwen3MoeForCausalLM"),
        ({"logits_scaling": 8.0}, r"does not scale or cap logits: .* a factor of 8\.0 and a cap of None"),
        ({"final_logit_softcapping": 30.0}, r"a factor of 1\.0 and a cap of 30\.0"),
    ],
)
def test_unsupported_models_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(QWEN3_30B | change)


@pytest.mark.parametrize(
    "unused",
    [
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 48},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 48},
    ],
)
def test_a_window_that_no_layer_uses_is_no_reason_to_refuse(unused: dict) -> None:
    assert from_hf(QWEN3_30B | unused) == from_hf(QWEN3_30B | {"layer_types": ["full_attention"] * 48})


def test_a_composite_model_is_not_taken_for_its_text_part() -> None:
    inner = {k: v for k, v in QWEN3_30B.items() if k != "architectures"}
    composite = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": inner}
    with pytest.raises(
        ValueError, match=r"does not know the architecture 'Qwen3VLMoeForConditionalGeneration'"
    ):
        from_hf(composite)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json is missing"):
        read_architecture(tmp_path)


OTHERS = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "cohere",
    "olmo2",
    "phi3",
    "llama4_text",
]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_family_is_built_or_refused_by_name(name: str) -> None:
    """As transformers writes its config. A refusal names the class and the learner that takes it."""
    family = name.split()[0]
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(name, {})))
    hf_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    written = config.to_dict() | {"architectures": [hf_class]}
    if hf_class in SUPPORTED:
        assert from_hf(written).family == family
    else:
        with pytest.raises(ValueError, match=rf"architecture '{hf_class}'.*use learner=deepspeed"):
            from_hf(written)


def test_shared_experts_are_read() -> None:
    config = QWEN3_30B | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 5632,
    }
    assert from_hf(config).shared_ffn == 5632
