"""Parameter counts against models that transformers builds (on the meta device) and published totals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from gspo_dist.models.shape import countable, find_model, read_shape, shape_from_config
from gspo_dist.routing.trace import RoutingTrace

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, head_dim left out": Qwen3Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE, head_dim=8),
    "qwen3_moe, head_dim left out": Qwen3MoeConfig(**SIZES, **MOE),
    "qwen3_moe, biases and tied": Qwen3MoeConfig(
        **SIZES, **MOE, attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3_moe, every second layer": Qwen3MoeConfig(**SIZES, **MOE, decoder_sparse_step=2),
    "qwen3_moe, layer 1 dense": Qwen3MoeConfig(**SIZES, **MOE, mlp_only_layers=[1]),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=22),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SIZES, num_experts=5, num_experts_per_tok=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_count_equals_the_model_that_transformers_builds(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())  # a tied head is one parameter
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    shape = shape_from_config(json.loads(config.to_json_string()))
    assert shape.total == counted
    assert shape.experts_total == routed
    if shape.moe_layers:
        assert shape.active == counted - routed * (5 - 2) // 5


def test_qwen3_30b_a3b_has_its_published_counts() -> None:
    shape = find_model("Qwen/Qwen3-30B-A3B")
    assert shape.total == 30_532_122_624
    assert shape.active == 3_353_032_704
    assert shape.active_without_embedding == 3_353_032_704 - 151_936 * 2048
    assert shape.expert == 4_718_592
    assert shape.experts_total == 48 * 128 * 4_718_592
    assert shape.attention == 18_874_368  # 2048 x (4096 + 2 x 512) + 4096 x 2048
    assert shape.kv_bytes_per_token() == 98_304


def test_a_trace_row_takes_the_bytes_that_a_trace_of_one_token_holds() -> None:
    for name, layers, top_k, experts in (("Qwen3-30B-A3B", 48, 8, 128), ("Mixtral-8x7B", 32, 2, 8)):
        trace = RoutingTrace(np.zeros((1, layers, top_k), np.uint8), np.ones(1, np.bool_), experts)
        assert find_model(name).trace_bytes_per_token == trace.nbytes == layers * top_k + 1
    assert shape_from_config(CONFIGS["qwen3"].to_dict()).trace_bytes_per_token == 0
    many = {**CONFIGS["qwen3_moe"].to_dict(), "num_experts": 257}  # ids of two bytes
    assert shape_from_config(many).trace_bytes_per_token == 3 * 2 * 2 + 1


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("Qwen3-235B-A22B", 235.09, 22.19), ("OLMoE-1B-7B", 6.92, 1.28), ("Mixtral-8x7B", 46.70, 12.88)],
)
def test_built_in_models_have_their_published_counts(name: str, total: float, active: float) -> None:
    shape = find_model(name)
    assert round(shape.total / 1e9, 2) == total
    assert round(shape.active / 1e9, 2) == active


def test_forward_flops_of_one_token_are_twice_its_matrices_plus_attention() -> None:
    shape = find_model("Qwen3-30B-A3B")
    # 48 layers, 4096 query channels, 1000 tokens: each token meets 500 others on average, 4 FLOPs a channel
    # and pair
    assert shape.forward_flops(1, 1000) == 2 * 3_041_867_776 + 4 * 48 * 4096 * 500


def test_a_folder_is_read_like_a_name(tmp_path) -> None:
    (tmp_path / "config.json").write_text(CONFIGS["mixtral"].to_json_string())
    assert find_model(str(tmp_path)).total == shape_from_config(CONFIGS["mixtral"].to_dict()).total


def test_unknown_models_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Qwen3-30B-A3B.*got 'nothing-here'"):
        find_model("nothing-here")
    with pytest.raises(ValueError, match=r"model_type must be one of llama.*got 'deepseek_v3'"):
        countable(shape_from_config({"model_type": "deepseek_v3"}))
    with pytest.raises(ValueError, match="mlp_bias"):
        countable(shape_from_config({**CONFIGS["llama"].to_dict(), "mlp_bias": True}))


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ],
)
@pytest.mark.parametrize("value", [None, 0, "many"])
def test_a_config_without_a_size_is_refused_with_its_model_and_the_key(tmp_path, key, value) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({**CONFIGS["qwen3_moe"].to_dict(), key: value}))
    with pytest.raises(
        ValueError, match=f"config.json of half must give {key}, a whole number above 0: got {value!r}"
    ):
        find_model(str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"# a page", "it is not JSON"),
        (b"", "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[1, 2]", "it holds a list"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, reason) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"notes.md must be an HF config.json: {reason}"):
        find_model(str(path))


def test_a_composite_folder_is_read_by_its_text_part(tmp_path) -> None:
    """Qwen3.5 keeps its experts under `text_config`; its folder is no dense model."""
    text = {**CONFIGS["qwen3_moe"].to_dict(), "max_position_embeddings": 4096}
    written = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "vision_config": {},
        "text_config": text,
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    shape = read_shape(tmp_path)
    assert (shape.num_experts, shape.top_k, shape.moe_layers, shape.context) == (5, 2, 3, 4096)
    assert shape.architecture == "Qwen3_5MoeForConditionalGeneration"
    assert shape.name == tmp_path.name


@pytest.mark.parametrize(
    ("config", "scale", "cap"),
    [
        ({"model_type": "granite", "logits_scaling": 8.0}, 0.125, None),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, 8.0, None),
        ({"model_type": "cohere2", "logit_scale": 0.25}, 0.25, None),
        ({"model_type": "cohere"}, 0.0625, None),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5, None),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"model_type": "llama"} | SIZES, 1.0, None),
    ],
)
def test_scales_after_the_head_are_read(config, scale, cap) -> None:
    shape = shape_from_config(config)
    assert (shape.logit_scale, shape.logit_softcap) == (scale, cap)
    assert shape.scales_logits == (scale != 1.0 or cap is not None)


@pytest.mark.parametrize(
    ("counts", "experts", "top_k"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 8, 2),
        ({"n_routed_experts": 16, "num_experts_per_tok": 4}, 16, 4),
        ({"moe_num_experts": 6, "moe_k": 3}, 6, 3),
        ({"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2}}, 4, 2),
        ({"num_experts": 8, "top_k_experts": 2, "enable_moe_block": False}, 0, 0),
        ({"num_experts": [4, 4], "moe_topk": [2, 2]}, 4, 2),
    ],
)
def test_experts_are_counted_under_any_of_their_names(counts, experts, top_k) -> None:
    shape = shape_from_config({"model_type": "other", "num_hidden_layers": 2, **counts})
    assert (shape.num_experts, shape.top_k) == (experts, top_k)
    assert shape.expert_layers == ((True, True) if experts else ())


def test_windows_and_memory_are_told_by_layer() -> None:
    mixed = shape_from_config(
        {
            "model_type": "other",
            "num_hidden_layers": 4,
            "sliding_window": 32,
            "attention_chunk_size": 16,
            "layer_types": ["linear_attention", "conv", "sliding_attention", "full_attention"],
        }
    )
    assert mixed.layers_with_memory == (0, 1)
    assert (mixed.window, mixed.chunk) == (32, None)
