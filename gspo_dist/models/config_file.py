"""The file `config.json` of an HF model, and the published ones of models that plans often ask about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "intermediate_size": 6144,
    "tie_word_embeddings": False,
}

BUILT_IN: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
    },
    "OLMoE-1B-7B": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
    },
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
    },
}
"""Name of a model -> what decides the shapes in its published `config.json`."""


def find_config(name: str) -> tuple[Mapping[str, Any], str]:
    """A model's config and its name, found by a built-in name or by a path.

    name: a key of `BUILT_IN` (neither case nor a vendor prefix matters), an HF folder, or the path of a
    config.json. ValueError where it is none of these.
    """
    for known, config in BUILT_IN.items():
        if name.lower().rsplit("/", 1)[-1] == known.lower():
            return config, known
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return read_config(path), path.resolve().parent.name
    raise ValueError(
        f"plan.model must be a folder with a config.json or one of {', '.join(BUILT_IN)}: got {name!r}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """An HF config.json. ValueError names a file that is none."""
    way_out = "give plan.model or model.path the folder of an HF model"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be an HF config.json: it is not JSON ({error}); {way_out}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be an HF config.json: it holds a {type(config).__name__}; {way_out}")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model.

    A composite model (text with vision or audio) keeps it under `text_config`. Its `architectures` and a
    tie of its embeddings stand outside, so they are carried in.
    """
    inner = config.get("text_config") or config.get("llm_config")
    if not isinstance(inner, Mapping):
        return config
    outer = {k: config[k] for k in ("architectures", "tie_word_embeddings") if k in config}
    return {**outer, **inner, **{k: v for k, v in outer.items() if k == "architectures"}}
