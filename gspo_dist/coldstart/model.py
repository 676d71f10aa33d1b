"""Building and saving a recipe's model in the Hugging Face format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import EOS_ID, PAD_ID, VOCABULARY, build_tokenizer


def model_config(shape: Shape) -> Qwen3MoeConfig:
    """The HF config, with every value that Qwen's own checkpoints set and the defaults of the class do not.

    In transformers 5.19 norm_topk_prob is False by default, and head_dim is hidden / heads.
    """
    return Qwen3MoeConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.expert_hidden,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.001,
        output_router_logits=False,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        initializer_range=shape.init_std,
        tie_word_embeddings=False,
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def build_model(shape: Shape, seed: int) -> Qwen3MoeForCausalLM:
    """Random weights in float32, the same for the same seed. The caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(model_config(shape)).float()


def save_model(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    """Writes all that transformers and vLLM need: float32 weights, config, generation config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
