"""Model folders of several families, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **ROUTED},
    "qwen2_moe": {"shared_expert_intermediate_size": 24, **ROUTED},
    "olmoe": ROUTED,
    "mixtral": {"sliding_window": None, **LOCAL},
    "granitemoe": LOCAL,
    "glm4_moe": {"head_dim": 16, "use_qk_norm": True, **DEEPSEEK},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        **DEEPSEEK,
        "num_key_value_heads": 2,
    },
}


def make(folder: Path, family: str = "qwen3_moe", seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Writes a model with random weights (and buffers of routers) and returns it as read back; its words are
    t0, t1 (the end), t2 (unknown) and so on.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.1)
        for name, buffer in hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    hf.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(folder)
    return read(folder)


def read(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a folder as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(hf: torch.nn.Module) -> torch.Tensor:
    """Logits [20, V] of a fixed sequence."""
    return hf(torch.arange(2, 22)[None]).logits[0]
