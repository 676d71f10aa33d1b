"""Which HF models the megatron learner builds, read without torch from their `config.json`.

They share one block: RMSNorm, grouped-query attention with rotary positions, SwiGLU. They differ in a bias,
in a norm of queries and keys, and in the mixture of experts. `models.shape` reads the sizes; this module
refuses what the builder and the converter would get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_dist.models.layers import FULL
from gspo_dist.models.shape import ModelShape, read_shape, shape_from_config

SUPPORTED = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "MixtralForCausalLM": "mixtral",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
"""HF class -> its family, `model_type`."""


def read_architecture(model_dir: str | Path) -> ModelShape:
    """The shape of the HF model in `model_dir`. ValueError names what is not supported, and what is."""
    return supported(read_shape(model_dir))


def from_hf(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes. ValueError names what is not supported, and what is."""
    return supported(shape_from_config(config))


def supported(shape: ModelShape) -> ModelShape:
    """`shape` itself, or ValueError where the megatron learner would build another model than HF does."""
    name = shape.architecture
    if name not in SUPPORTED:
        raise ValueError(
            f"the megatron learner does not know the architecture {name or None!r}: it builds "
            f"{', '.join(SUPPORTED)}; use learner=deepspeed for any other HF model"
        )
    if shape.family != SUPPORTED[name]:
        raise ValueError(
            f"config.json must give model_type {SUPPORTED[name]!r} for {name}: got {shape.family!r}; take "
            "the model's own file"
        )
    if shape.rope_type != "default":
        raise ValueError(
            f"the megatron learner supports rope_type 'default' only: got {shape.rope_type!r} for {name}; "
            "use learner=deepspeed"
        )
    # Windows that no layer uses do no harm: only the layers are asked.
    limited = [layer for layer, kind in enumerate(shape.layer_kinds) if kind != FULL]
    if limited:
        raise ValueError(
            f"the megatron learner has full attention only: {name} asks for "
            f"{shape.layer_kinds[limited[0]]} in {len(limited)} of {shape.layers} layers, the first of them "
            f"layer {limited[0]}; use learner=deepspeed"
        )
    if shape.activation != "silu":
        raise ValueError(f"the megatron learner supports hidden_act 'silu' only: got {shape.activation!r}")
    # Qwen2's bias of queries, keys and values is built. A bias of the output projection is not.
    if shape.out_bias or shape.mlp_bias:
        raise ValueError(f"the megatron learner supports no attention_bias or mlp_bias for {name}: unset it")
    if shape.scales_logits:
        raise ValueError(
            f"the megatron learner does not scale or cap logits: {name} asks for a factor of "
            f"{shape.logit_scale} and a cap of {shape.logit_softcap}; use learner=deepspeed"
        )
    return shape
