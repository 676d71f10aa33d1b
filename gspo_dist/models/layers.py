"""Which layers of a model attend to what, and which hold experts: rules read from `config.json`.

A config either lists its layers (`layer_types`, `mlp_layer_types`) or leaves them to a rule of its family.
The rules below are those of the configuration classes of transformers 5.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, CONVOLUTION, HYBRID = "linear_attention", "conv", "hybrid"
INDEXED = "indexed_attention"
MEMORY = frozenset({LINEAR, CONVOLUTION, HYBRID, "hybrid_sliding"})
"""Layers that carry a state from token to token, so that a packed sequence would see its neighbour."""

# Older names of the same layers.
_SAME = {
    "mamba": LINEAR,
    "mamba2": LINEAR,
    "recurrent": LINEAR,
    "linear": LINEAR,
    "attention": FULL,
    "full": FULL,
    "short_conv": CONVOLUTION,
}
# Families whose layers are all of one kind, whatever their configs list.
_ALWAYS = {
    "mamba": LINEAR,
    "mamba2": LINEAR,
    "falcon_mamba": LINEAR,
    "rwkv": LINEAR,
    "xlstm": LINEAR,
    "falcon_h1": HYBRID,
}
# Families whose layers are all of one kind where their configs list none.
_UNLESS_LISTED = {
    "granitemoehybrid": LINEAR,
    "inkling_text": HYBRID,
    "zaya": HYBRID,
    "axk2": INDEXED,
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": INDEXED,
    "hy_v4": INDEXED,
    "laguna": FULL,
    "mellum": FULL,
    "cohere_compass_text": FULL,
}
# Families whose window counts only where `use_sliding_window` is true.
_ASK_FOR_WINDOWS = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_omni_moe_text"})
# Layer i keeps full attention where (i + 1) is a multiple of this; the others slide.
_PATTERN = {
    "gemma2": 2,
    "gpt_oss": 2,
    "vaultgemma": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "gemma4_unified_text": 6,
    "cohere2": 4,
    "cohere2_moe": 4,
    "olmo3": 4,
    "afmoe": 4,
    "exaone4": 4,
    "exaone_moe": 4,
}
# Layer i keeps full attention where i is a multiple of this.
_PATTERN_FROM_FIRST = {"granite_swa": 4, "granitemoe_swa": 4, "cwm": 4}
# The first pattern with linear attention in place of windows.
_LINEAR_PATTERN = {"qwen3_next": 4, "qwen3_5_moe_text": 4, "qwen3_5_text": 4, "olmo_hybrid": 4}
_NEMOTRON = {"M": LINEAR, "*": FULL, "E": "moe", "-": "mlp"}
# Leading dense layers of a family whose config leaves them out.
_DENSE_FIRST = {
    "deepseek_v3": 3,
    "deepseek_v32": 3,
    "glm_moe_dsa": 3,
    "glm5_next": 3,
    "glm4_moe": 1,
    "glm4v_moe": 1,
    "glm4v_moe_text": 1,
    "glm4_moe_lite": 1,
    "exaone_moe": 1,
    "axk1": 1,
    "axk2": 1,
    "hy_v4": 1,
    "mimo_v2_flash": 1,
    "kimi_linear": 1,
    "hy_v3": 1,
    "laguna": 1,
    "afmoe": 1,
    "lfm2_moe": 2,
    "ernie4_5_moe": 1,
}


def layer_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """What each layer attends to, in the words of transformers' `layer_types`.

    Example: Qwen3-Next with 4 layers gives three times linear_attention, then full_attention.
    """
    family = str(config.get("model_type", ""))
    if family in _ALWAYS:
        return (_ALWAYS[family],) * layers
    listed = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    if isinstance(listed, (list, tuple)) and listed:
        # A short list is a pattern that repeats (recurrent_gemma).
        return tuple(
            _SAME.get(str(listed[i % len(listed)]), str(listed[i % len(listed)])) for i in range(layers)
        )
    if isinstance(config.get("hybrid_override_pattern"), str):
        return tuple(_NEMOTRON.get(letter, "mlp") for letter in config["hybrid_override_pattern"])
    if family in _UNLESS_LISTED:
        return (_UNLESS_LISTED[family],) * layers
    return tuple(map(_kind_by_rule(config, family), range(layers)))


def _kind_by_rule(config: Mapping[str, Any], family: str) -> Callable[[int], str]:
    """Layer index -> its kind, where the config lists none."""
    window = config.get("sliding_window")
    if family in _LINEAR_PATTERN or "full_attention_interval" in config:
        every = int(config.get("full_attention_interval") or _LINEAR_PATTERN.get(family, 4))
        return lambda i: FULL if (i + 1) % every == 0 else LINEAR
    if family == "minimax":
        return lambda i: LINEAR if i % 2 else FULL
    if "attn_layer_period" in config:  # jamba
        period, offset = int(config["attn_layer_period"]), int(config.get("attn_layer_offset", 0))
        return lambda i: FULL if i % period == offset else LINEAR
    if "attn_layer_indices" in config:  # bamba
        full = set(config["attn_layer_indices"] or ())
        return lambda i: FULL if i in full else LINEAR
    if "full_attn_idxs" in config:  # lfm2
        full = set(config["full_attn_idxs"] or ())
        return lambda i: FULL if i in full else CONVOLUTION
    if family.startswith("llama4"):
        without_positions = config.get("no_rope_layers") or ()
        every = int(config.get("no_rope_layer_interval", 4))
        return lambda i: (
            CHUNKED
            if (without_positions[i] if i < len(without_positions) else (i + 1) % every != 0)
            else FULL
        )
    if not window or (family in _ASK_FOR_WINDOWS and not config.get("use_sliding_window")):
        return lambda i: FULL
    if config.get("use_sliding_window") is False:
        return lambda i: FULL
    if family in _PATTERN_FROM_FIRST:
        return lambda i: SLIDING if i % _PATTERN_FROM_FIRST[family] else FULL
    every = _window_pattern(config, family)
    if every:
        return lambda i: FULL if (i + 1) % every == 0 else SLIDING
    first = int(config.get("max_window_layers") or 0)
    if family == "qwen2_moe":  # the one family whose windows end where the others' begin
        return lambda i: SLIDING if (i + 1) % 2 and i < first else FULL
    return lambda i: SLIDING if i >= first else FULL


def _window_pattern(config: Mapping[str, Any], family: str) -> int:
    """Every so many layers one has full attention; 0 where windows follow no such pattern."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if isinstance(pattern, str):  # exaone4 writes it out: "LLLG"
        return len(pattern)
    return int(pattern or config.get("global_attn_every_n_layers") or _PATTERN.get(family, 0))


def expert_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers hold routed experts, for a config that has some.

    Example: DeepSeek-V3 with `first_k_dense_replace` 3 and 5 layers gives (False, False, False, True, True).
    """
    listed = config.get("mlp_layer_types")
    if isinstance(listed, (list, tuple)) and len(listed) >= layers:
        return tuple(kind != "dense" for kind in listed[:layers])
    return tuple(map(_experts_by_rule(config, layers), range(layers)))


def _experts_by_rule(config: Mapping[str, Any], layers: int) -> Callable[[int], bool]:
    """Layer index -> whether it has experts, where the config lists no `mlp_layer_types`."""
    family = str(config.get("model_type", ""))
    if family == "nemotron_h":
        kinds = layer_kinds(config, layers)
        return lambda i: kinds[i] == "moe"
    if family.startswith("llama4"):
        step = int(config.get("interleave_moe_layer_step", 1))
        chosen = set(config.get("moe_layers") or range(step - 1, layers, step))
        return lambda i: i in chosen
    if "expert_layer_period" in config:  # jamba
        period, offset = int(config["expert_layer_period"]), int(config.get("expert_layer_offset", 0))
        return lambda i: i % period == offset
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, (list, tuple)):
        return lambda i: bool(frequency[i])
    if "moe_layer_interval" in config or family == "ernie4_5_moe":
        every, start = int(config.get("moe_layer_interval", 1)), int(config.get("moe_layer_start_index", 1))
        end = int(config.get("moe_layer_end_index", -1))
        return lambda i: (i + 1) % every == 0 and start <= i <= (layers - 1 if end == -1 else end)
    dense = set(config.get("mlp_only_layers") or ())
    step = int(config.get("decoder_sparse_step") or 1)
    first = config.get("first_k_dense_replace", config.get("num_dense_layers"))
    first = _DENSE_FIRST.get(family, 0) if first is None else int(first)
    every = int(frequency or 1)
    return lambda i: i not in dense and (i + 1) % step == 0 and i >= first and i % every == 0
