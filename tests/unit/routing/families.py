"""Toy models of the families of transformers whose routers can be replayed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61
# One table for all: a family takes the names that it knows, and nothing reads the others.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # experts under the names that families give them
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
}
GROUPS = {"n_group": 4, "topk_group": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_chunk_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    # softmax over all experts, with and without renormalisation
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_moe plain": {"norm_topk_prob": False},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_next": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "olmoe": {},
    "flex_olmo": {},
    "mellum": {},
    "mixtral": {},
    "minimax": {},
    "hunyuan_v1_moe": {},
    "ernie4_5_moe": {},
    # sigmoid with a correction bias, without groups and within them
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8},
    "deepseek_v3": LATENT | GROUPS,
    "deepseek_v32": LATENT | GROUPS | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8},
    "dots1": {},
    "exaone_moe": {},
    "hy_v3": {},
    "solar_open": {},
    "mimo_v2_flash": {},
    "axk1": LATENT | GROUPS,
    "axk2": LATENT | GROUPS | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8},
    "hy_v4": LATENT | GROUPS | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8},
    "minimax_m3_vl_text": {},
    "nemotron_h": {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "afmoe": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "minimax_m2": {},
    "laguna": {},
    # softmax over the chosen logits
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "granitemoe_swa": {},
    "gpt_oss": {},
    "aria_text": {},
    "cohere2_moe": {},
    # softmax with groups and a factor
    "deepseek_v2": LATENT | GROUPS | {"topk_method": "group_limited_greedy"},
}


def make(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random model whose weights, and the biases of its choice, are far from their neutral values."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.split()[0], **(SIZES | FAMILIES.get(name, {}) | changes))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0.0, 0.3)
        for key, buffer in model.named_buffers():
            if "e_score_correction_bias" in key or "expert_bias" in key:
                buffer.normal_(0.0, 0.2)
    return model
