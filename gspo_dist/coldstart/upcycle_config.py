"""Which dense models have a MoE class that computes the same, and the config of that MoE.

    dense             MoE (default first)       what the MoE class has to have a place for
    llama, mistral    mixtral                   no biases
    llama, mistral    qwen2_moe                 zero biases of q, k, v; a silent shared expert
    qwen2             qwen2_moe                 its biases of q, k, v
    qwen3             qwen3_moe                 its norms of queries and keys

Qwen3-MoE is no target for the others: its norm of queries and keys changes attention whatever its weights.
"""

from __future__ import annotations

import copy
from typing import Any

from gspo_dist.checks import nearest

TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
}
"""`model_type` of a dense model -> MoE families that can hold it, the default first."""
SHARED_WIDTH = 64
"""Inner width of Qwen2-MoE's shared expert, which no dense layer has. Its output projection starts at zero,
so it says nothing before it is trained."""
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def family_for(dense: Any, family: str | None) -> str:
    """The MoE family for a dense HF config: `family`, or the default one where it is None.

    ValueError where the dense model cannot be mapped to it.
    """
    kind = str(dense.model_type)
    if kind not in TARGETS:
        raise ValueError(f"upcycling must know the dense model's family: got {nearest_kind(kind)}")
    wanted = family or TARGETS[kind][0]
    if wanted not in TARGETS[kind]:
        raise ValueError(
            f"a {kind} model must become one of {', '.join(TARGETS[kind])}: got {wanted!r}"
            + _reason(kind, wanted)
        )
    _check(dense, kind, wanted)
    return wanted


def nearest_kind(kind: str) -> str:
    """The tail of a message about an unknown family."""
    return f"{kind!r}; {nearest(kind, TARGETS)}"


def _reason(kind: str, wanted: str) -> str:
    if wanted == "qwen3_moe":
        return f", whose norm of queries and keys {kind} does not have"
    if wanted == "mixtral":
        return f", which has no place for {'biases' if kind == 'qwen2' else 'norms of queries and keys'}"
    return ""


def _check(dense: Any, kind: str, wanted: str) -> None:
    """Raises ValueError for settings of the dense model that the MoE class would drop or read otherwise."""
    allowed = ("attention_bias",) if wanted == "qwen3_moe" else ()
    for name in ("attention_bias", "mlp_bias"):
        if getattr(dense, name, False) and name not in allowed:
            raise ValueError(
                f"{name} must be false: got true, and {wanted} has no place for these biases; "
                "upcycle a model without them"
            )
    if getattr(dense, "quantization_config", None):
        raise ValueError("the dense model's weights must not be quantised: save it in bf16 or fp32 first")
    odd = [k for k in getattr(dense, "layer_types", None) or () if k != "full_attention"]
    if getattr(dense, "use_sliding_window", False) or (odd and kind != "mistral"):
        raise ValueError(
            f"every layer must attend to all tokens: got {odd[0] if odd else 'a sliding window'}, and "
            f"{wanted} places its windows by another rule; set use_sliding_window=false in config.json if "
            "the model allows it"
        )
    if wanted == "qwen2_moe" and getattr(dense, "sliding_window", None) and kind == "mistral":
        raise ValueError(
            f"sliding_window must be null for qwen2_moe: got {dense.sliding_window}; take family=mixtral"
        )
    # vLLM 0.30's Qwen2-MoE divides the hidden size by the heads and reads no head_dim.
    if wanted == "qwen2_moe" and head_dim(dense) * dense.num_attention_heads != dense.hidden_size:
        raise ValueError(
            f"head_dim x heads must be the hidden size for qwen2_moe: got {head_dim(dense)} x "
            f"{dense.num_attention_heads} and {dense.hidden_size}"
            + ("; take family=mixtral" if "mixtral" in TARGETS[kind] else "")
        )


def head_dim(dense: Any) -> int:
    """Width of one head."""
    return int(getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads)


def moe_config(dense: Any, family: str, experts: int, top_k: int) -> Any:
    """The HF config of the MoE. `dense` was accepted by `family_for`.

    Every value is written out. The classes differ in defaults: rotary base 1e4 or 1e6, epsilon 1e-6 or 1e-5.
    """
    from transformers import AutoConfig

    shared: dict[str, Any] = {name: getattr(dense, name, None) for name in _COPIED}
    shared |= {
        "head_dim": head_dim(dense),
        "rope_parameters": copy.deepcopy(dense.rope_parameters),
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
    }
    if family == "mixtral":
        window = getattr(dense, "sliding_window", None)
        config = AutoConfig.for_model(family, **shared, num_local_experts=experts, sliding_window=window)
        config.architectures = ["MixtralForCausalLM"]
        return config
    shared |= {
        "num_experts": experts,
        "moe_intermediate_size": dense.intermediate_size,
        "norm_topk_prob": True,  # the classes have false; equal experts must sum to one of them
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }
    if family == "qwen2_moe":
        config = AutoConfig.for_model(
            family, **shared, shared_expert_intermediate_size=SHARED_WIDTH, qkv_bias=True
        )
        config.architectures = ["Qwen2MoeForCausalLM"]
        return config
    config = AutoConfig.for_model(family, **shared, attention_bias=dense.attention_bias)
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config
