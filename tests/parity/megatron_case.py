"""What the parity tests of the megatron learner and their worker processes share: models and data."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo_dist.config import LearnerConfig, MegatronConfig, OptimizerConfig
from gspo_dist.learners.loss import LossSpec
from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.objectives.objective import get_objective
from gspo_dist.types import PackedBatch

VOCAB = 96
STEPS = 3
LENGTHS = [[7, 12, 5], [16, 9], [11, 3, 8, 4], [21]]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-6,
}
MAKERS = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe_plain": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
            "mlp_only_layers": [2],
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
}


def make_model(kind: str, folder: Path, shard_size: str = "64KB") -> Path:
    """A random model whose norms and biases are not at their neutral values, saved as several shards."""
    torch.manual_seed(7)
    cls, config, extra = MAKERS[kind]
    model = cls(config(**SIZES, **extra)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.config.pad_token_id = model.config.eos_token_id = (
        5  # it occurs: its embedding is trained as any other's
    )
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_batches(seed: int = 3) -> list[PackedBatch]:
    """Four micro-batches of ten sequences with prompts of 2 tokens. `near` gives the engine's log-probs."""
    generator = torch.Generator().manual_seed(seed)
    batches, start = [], 0
    for lengths in LENGTHS:
        total = sum(lengths)
        position = torch.cat([torch.arange(n) for n in lengths])
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        mask = position >= 2
        advantage = torch.randn(len(lengths), generator=generator)
        batches.append(
            PackedBatch(
                token_ids=torch.randint(0, VOCAB, (total,), generator=generator),
                position_ids=position,
                cu_seqlens=cu,
                loss_mask=mask,
                advantages=torch.repeat_interleave(advantage, torch.tensor(lengths)).float(),
                rollout_logprobs=torch.zeros(total),
                rollout_index=torch.arange(start, start + len(lengths)),
            )
        )
        start += len(lengths)
    return batches


def near(batches: list[PackedBatch], logprobs: list[torch.Tensor], seed: int = 5) -> list[PackedBatch]:
    """Sets the engine's log-probs a little off the policy's: ratios differ from 1 and some are clipped."""
    generator = torch.Generator().manual_seed(seed)
    noise = [0.3 * torch.randn(len(x), generator=generator) for x in logprobs]
    return [
        b.with_(rollout_logprobs=torch.where(b.loss_mask, x + n, 0.0).float())
        for b, x, n in zip(batches, logprobs, noise, strict=True)
    ]


def make_spec(batches: list[PackedBatch], name: str = "gspo") -> LossSpec:
    """A wide clip range, so that in every step some sequences lie on either side of it."""
    sequences = sum(b.num_sequences for b in batches)
    tokens = int(sum(b.loss_mask.sum() for b in batches))
    own = {"weight_cap": 1.5} if name == "score_centering" else {"clip_low": 0.2, "clip_high": 0.2}
    return LossSpec(
        get_objective(name, allow_wide_clip=True, **own),
        Denominators(sequences, tokens, 64),
    )


def make_config(
    world_size: int = 1, precision: str = "fp32", backend: str = "megatron", **megatron
) -> LearnerConfig:
    """Gradient clipping is on and bites, so that a wrong norm shows in the parameters."""
    return LearnerConfig(
        backend=backend,
        world_size=world_size,
        precision=precision,
        token_budget=64,
        forward_token_budget=256,  # a pass of its own for the routers' shift takes all at once
        timeout_s=120.0,
        optimizer=OptimizerConfig(lr=2e-4, weight_decay=0.1, grad_clip=0.05, warmup_steps=2, eps=1e-6),
        megatron=MegatronConfig(**megatron),
    )
