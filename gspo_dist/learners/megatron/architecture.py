"""What the builder and the converter need to know of a model: read from an HF `config.json`, without torch.

The four architectures share one block: RMSNorm, grouped-query attention with rotary positions, SwiGLU; they differ in
a bias, in a norm of queries and keys, and in the mixture of experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = {
    "Qwen3MoeForCausalLM": "mixture of experts, norm of queries and keys",
    "Qwen3ForCausalLM": "dense, norm of queries and keys",
    "Qwen2ForCausalLM": "dense, bias of queries, keys and values",
    "LlamaForCausalLM": "dense",
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder. `num_experts` is 0 for a dense model; `moe_layers[i]`: layer i has experts."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0
    top_k: int = 0
    expert_ffn_size: int = 0
    renormalise_top_k: bool = True
    moe_layers: tuple[bool, ...] = ()

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts: the depth of a routing trace."""
        return sum(self.moe_layers)


def read_architecture(model_dir: str | Path) -> Architecture:
    """The architecture of the HF model in `model_dir`; ValueError names what is not supported and what is."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path must be a folder of an HF model: {path} is missing; point it at one")
    return from_hf(json.loads(path.read_text()))


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Reads either spelling of a config: transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
    name = (config.get("architectures") or [None])[0]
    if name not in SUPPORTED:
        raise ValueError(
            f"the megatron learner does not know the architecture {name!r}: it builds {', '.join(SUPPORTED)}; "
            "use learner=deepspeed for any other HF model"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"the megatron learner supports rope_type 'default' only: got {kind!r} for {name}; use learner=deepspeed"
        )
    if config.get("use_sliding_window"):
        raise ValueError(
            f"the megatron learner has no sliding window: {name} asks for one; use learner=deepspeed"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"the megatron learner supports hidden_act 'silu' only: got {config['hidden_act']!r}"
        )
    if (config.get("attention_bias") and name != "Qwen2ForCausalLM") or config.get("mlp_bias"):
        raise ValueError(f"the megatron learner supports no attention_bias or mlp_bias for {name}: unset it")
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    moe = _experts(config, layers) if name == "Qwen3MoeForCausalLM" else {"moe_layers": (False,) * layers}
    return Architecture(
        name=name,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        ffn_size=int(config["intermediate_size"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        max_positions=int(config.get("max_position_embeddings", 32768)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=name == "Qwen2ForCausalLM",
        qk_norm=name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        **moe,
    )


def _experts(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """HF's rule: layer i has experts unless listed in mlp_only_layers, every decoder_sparse_step-th layer."""
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []
    has = tuple(i not in dense and experts > 0 and (i + 1) % step == 0 for i in range(layers))
    return {
        "num_experts": experts,
        "top_k": int(config["num_experts_per_tok"]),
        "expert_ffn_size": int(config["moe_intermediate_size"]),
        "renormalise_top_k": bool(config.get("norm_topk_prob", False)),
        "moe_layers": has,
    }
