"""A small model of the same architecture: the config of a large one with few layers and small sizes.

A check on it costs what a model of about a million parameters costs, and runs the same code as the large
model: every kind of layer, the same rules for experts, the same scales. Windows and chunks shrink too, so
that short sequences cross them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gspo_dist.models.config_file import text_config
from gspo_dist.models.shape import ModelShape, shape_from_config

VOCABULARY = 128
"""Tokens of a miniature."""
HEAD_DIM = 32
"""Width of its heads. Half of it, and a quarter, is still an even number of rotary channels."""
HEADS = 4
"""Query heads of every layer."""

# Sizes by name. A number of the config that is smaller stays as it is.
_AT_MOST = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "laurel_rank": 8,
    "block_size": 16,
}
# Inner widths of feed-forward layers, under whatever name.
_INNER = re.compile(
    r"(intermediate_size\w*|ffn_hidden_size|ffn_dim|ffn_hidden_size|block_ff_dim|ffn_dim_base)$"
)
_TOKEN_ID = re.compile(r"\w*_token_id$")


def miniature(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model of an HF config, made small.

    Layers: the shortest beginning of the model that has every combination of kind and experts that the
    whole has. Example: DeepSeek-V3 (61 layers, the first 3 dense) keeps 4 layers, 8 of 256 experts and 2 of
    8 per token.
    """
    inner = dict(text_config(config))
    shape = shape_from_config(inner, "miniature")
    layers = _beginning(shape)
    small = {key: _shrunk(key, value) for key, value in inner.items()}
    small |= _by_layer(inner, shape.layers, layers)
    small |= _attention(inner, shape)
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if key in small:
            small[key] = layers
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"):
        if key in small:  # layers for multi-token prediction, which no learner runs
            small[key] = 0
    if small.get("moe_layer_end_index", -1) >= layers:
        small["moe_layer_end_index"] = layers - 1
    return small


def _beginning(shape: ModelShape) -> int:
    """How many leading layers hold every combination of (kind, has experts)."""
    if not shape.layers:
        return 0
    kinds = shape.layer_kinds or ("",) * shape.layers
    experts = shape.expert_layers or (False,) * shape.layers
    combinations = list(zip(kinds, experts, strict=False))
    # Two layers at least: the second one reads what the first one wrote.
    return min(shape.layers, max(2, *(combinations.index(c) + 1 for c in set(combinations))))


def _shrunk(key: str, value: Any) -> Any:
    """One entry of the config, smaller where its name is a size."""
    if isinstance(value, Mapping):
        return {k: _shrunk(k, v) for k, v in value.items()}
    if _TOKEN_ID.match(key):  # it may lie outside the small vocabulary
        return min(value, VOCABULARY - 1) if isinstance(value, int) else [0] if value else value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and key in _AT_MOST:
        return min(value, _AT_MOST[key])
    if _INNER.search(key):
        return min(value, 2 * HEAD_DIM) if whole else [2 * HEAD_DIM for _ in value] if value else value
    return value


def _by_layer(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Lists with one entry per layer are cut. Lists of layer numbers lose those that are gone."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(value, list) or not value:
            continue
        if key.endswith(("_idxs", "_indices", "_layers")) and all(isinstance(i, int) for i in value):
            # `no_rope_layers` lists one switch per layer; the others list layer numbers.
            cut = len(value) == before and set(value) <= {0, 1}
            found[key] = value[:after] if cut else [i for i in value if i < after]
        elif len(value) == before:
            found[key] = [_shrunk(key, v) for v in value[:after]]
    return found


def _attention(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Heads and widths that fit each other: hidden = heads x head_dim, and query heads share key heads.

    As many query heads share one as in the whole model, up to all HEADS.
    """
    ratio = max(1, shape.heads // max(1, shape.kv_heads))
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": max(1, HEADS // ratio),
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": max(1, HEADS // ratio),
        "num_global_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "global_head_dim": HEAD_DIM,
        "swa_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "attention_head_dim": 2 * HEAD_DIM,
        "kv_channels": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "hidden_size": HEADS * HEAD_DIM,
        "embedding_size": HEADS * HEAD_DIM,
        "block_dim": HEADS * HEAD_DIM,
        "conv_dim": HEADS * HEAD_DIM,
        "conv_dim_out": HEADS * HEAD_DIM,
        "lru_width": HEADS * HEAD_DIM,
        "n_embd": HEADS * HEAD_DIM,
        "d_model": HEADS * HEAD_DIM,
        "n_head": HEADS,
        "n_heads": HEADS,
        "mamba_n_heads": 2 * HEADS * HEAD_DIM // 16,
        "mamba_d_ssm": 2 * HEADS * HEAD_DIM,
        "dim_model_base": HEAD_DIM,
    }
    for key, value in sizes.items():
        if config.get(key) is not None:
            found[key] = value
    if "qk_rope_head_dim" in config and "head_dim" in config:
        # Latent attention: the config's head_dim is its rotary part.
        found["head_dim"] = min(int(config["qk_rope_head_dim"]), _AT_MOST["qk_rope_head_dim"])
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), Mapping):
            found[key] = _rope(config[key], config)
    return found


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings for heads of HEAD_DIM. Lists of one factor per rotary pair are cut to its length."""
    share = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    pairs = int(HEAD_DIM * share) // 2
    handlers: dict[str, Callable[[Any], Any]] = {
        "mrope_section": lambda v: [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4],
        "long_factor": lambda v: v[:pairs],
        "short_factor": lambda v: v[:pairs],
    }
    out: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, Mapping):
            out[key] = _rope(value, config)
        else:
            out[key] = handlers[key](value) if key in handlers and value else value
    return out
