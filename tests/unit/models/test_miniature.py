"""A miniature is the same architecture: every kind of layer, the same ratios, small enough to build."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.models.config_file import BUILT_IN
from gspo_dist.models.miniature import miniature
from gspo_dist.models.shape import shape_from_config


def written(family: str, **changes) -> dict:
    return json.loads(AutoConfig.for_model(family, **changes).to_json_string())


def test_a_large_model_keeps_its_heads_ratio_and_two_layers_with_few_experts() -> None:
    small = miniature(BUILT_IN["Qwen3-30B-A3B"])
    assert small["num_hidden_layers"] == 2
    assert small["num_experts"] == 8
    assert small["num_experts_per_tok"] == 2
    # 32 query heads over 4 of keys and values: a ratio of 8 on 4 heads leaves one.
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 1)
    assert (small["hidden_size"], small["head_dim"]) == (128, 32)
    assert small["moe_intermediate_size"] == 64
    assert small["vocab_size"] == 128


def test_sizes_that_are_small_already_stay() -> None:
    tiny = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 14, "vocab_size": 97}
    small = miniature(written("qwen3_moe", num_hidden_layers=2, **tiny))
    shape = shape_from_config(small)
    assert (shape.num_experts, shape.top_k, shape.expert_ffn, shape.vocab) == (4, 1, 14, 97)


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen3_next", {}, 4),  # three linear layers before the first full one
        ("deepseek_v3", {}, 4),  # three dense layers before the first with experts
        ("gemma3_text", {}, 6),
        ("gpt_oss", {}, 2),
        ("llama", {}, 2),
        ("jamba", {}, 5),  # the first attention layer is the fifth
    ],
)
def test_the_beginning_that_is_kept_has_every_kind_of_layer(family, changes, layers) -> None:
    config = written(family, **changes)
    whole, small = shape_from_config(config), shape_from_config(miniature(config))
    assert small.layers == layers
    assert set(small.layer_kinds) == set(whole.layer_kinds)
    assert set(small.expert_layers) == set(whole.expert_layers)


def test_lists_by_layer_are_cut_and_layer_numbers_beyond_the_end_dropped() -> None:
    config = {**written("qwen3_moe", num_hidden_layers=48), "mlp_only_layers": [1, 40]}
    small = miniature({**config, "layer_types": ["full_attention"] * 48})
    assert small["num_hidden_layers"] == 2
    assert small["mlp_only_layers"] == [1]
    assert small["layer_types"] == ["full_attention"] * 2


def test_windows_and_chunks_are_shorter_than_a_short_sequence() -> None:
    assert miniature(written("mistral"))["sliding_window"] == 16
    assert miniature(written("llama4_text"))["attention_chunk_size"] == 16


def test_scales_of_the_logits_and_ties_are_kept() -> None:
    small = shape_from_config(miniature(written("granite", logits_scaling=8.0, tie_word_embeddings=True)))
    assert (small.logit_scale, small.tied) == (0.125, True)
    assert shape_from_config(miniature(written("gemma2"))).logit_softcap == 30.0


def test_a_composite_config_gives_its_language_model() -> None:
    small = miniature(written("qwen3_5_moe"))
    assert small["model_type"] == "qwen3_5_moe_text"
    assert "vision_config" not in small


def test_token_ids_lie_within_the_small_vocabulary() -> None:
    small = miniature({**written("llama"), "bos_token_id": 128000, "eos_token_id": [128001, 128008]})
    assert small["bos_token_id"] == 127
    assert small["eos_token_id"] == [0]


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe", "mixtral", "glm4_moe", "llama"]
)
def test_a_miniature_of_the_default_size_is_built_with_few_parameters(family) -> None:
    small = miniature(written(family))
    kind = small.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
