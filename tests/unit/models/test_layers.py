"""Layer kinds and expert layers against the configuration classes and models of transformers, and by hand."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.models.layers import expert_layers, layer_kinds

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXED = (LINEAR, FULL, LINEAR)

# Families whose class works out `layer_types` where a config.json lists none.
WORKED_OUT = [
    "afmoe",
    "cohere2",
    "cohere2_moe",
    "deepseek_v32",
    "dots1",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gpt_oss",
    "granite_swa",
    "granitemoehybrid",
    "jamba",
    "llama4_text",
    "minimax",
    "olmo3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_next",
    "zaya",
]
MOE = [
    "afmoe",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "jamba",
    "lfm2_moe",
    "llama4_text",
    "mixtral",
    "olmoe",
    "qwen2_moe",
]


@pytest.mark.parametrize("family", WORKED_OUT)
@pytest.mark.parametrize("listed", [True, False])
def test_layers_are_of_the_kinds_that_transformers_works_out(family, listed) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=12)
    written = json.loads(config.to_json_string())
    if not listed:
        written = {k: v for k, v in written.items() if k not in ("layer_types", "layers_block_type")}
    assert list(layer_kinds(written, 12)) == config.layer_types


def test_windows_of_qwen2_and_qwen3_hold_only_where_they_are_asked_for() -> None:
    """dots.llm1 names a window too, and none of its layers begins late enough to use it."""
    asked = {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 3}
    assert layer_kinds({**asked, "use_sliding_window": False}, 4) == (FULL,) * 4
    assert layer_kinds({**asked, "use_sliding_window": True}, 4) == (FULL, FULL, FULL, SLIDING)
    dots = {"model_type": "dots1", "sliding_window": 4096, "max_window_layers": 62}
    assert layer_kinds(dots, 62) == (FULL,) * 62


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, (SLIDING,) * 3),
        ({"model_type": "mixtral", "sliding_window": None}, (FULL,) * 3),
        ({"model_type": "mamba2"}, (LINEAR,) * 3),
        ({"model_type": "falcon_h1"}, ("hybrid",) * 3),
        ({"model_type": "lfm2", "full_attn_idxs": [1]}, ("conv", FULL, "conv")),
        ({"model_type": "bamba", "attn_layer_indices": [2]}, (LINEAR, LINEAR, FULL)),
        ({"model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]}, MIXED),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*E"}, (LINEAR, FULL, "moe")),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention", "mamba"]}, MIXED),
        (
            {"model_type": "exaone4", "sliding_window": 64, "sliding_window_pattern": "LG"},
            (SLIDING, FULL, SLIDING),
        ),
    ],
)
def test_older_spellings_of_layers_are_read(config, kinds) -> None:
    assert layer_kinds(config, 3) == kinds


@pytest.mark.parametrize("family", MOE)
def test_experts_are_in_the_layers_where_transformers_builds_them(family) -> None:
    listed = {"layer_types": [FULL] * 5} if family == "lfm2_moe" else {}  # its class works out none
    config = AutoConfig.for_model(family, num_hidden_layers=5, **listed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    places = (re.search(r"layers\.(\d+)\..*experts", name) for name, _ in model.named_parameters())
    layers = {int(place[1]) for place in places if place}
    assert expert_layers(json.loads(config.to_json_string()), 5) == tuple(i in layers for i in range(5))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"first_k_dense_replace": 3}, (False, False, False, True)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (False, False, True, False)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, (False, True, True, False)),
        ({"num_dense_layers": 2}, (False, False, True, True)),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, (False, True, True, False)),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 2}, (False, True, False, True)),
        ({"model_type": "llama4_text", "moe_layers": [2]}, (False, False, True, False)),
        ({"expert_layer_period": 2, "expert_layer_offset": 0}, (True, False, True, False)),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 2}, (False, False, False, True)),
        ({"model_type": "deepseek_v3"}, (False, False, False, True)),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention", "moe"]},
            (False, True, False, True),
        ),
    ],
)
def test_every_rule_for_expert_layers_is_read(config, layers) -> None:
    assert expert_layers(config, 4) == layers
