"""What the parity tests of the DeepSpeed learner and its ranks share: models, data, steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo_dist.config import DeepSpeedConfig, LearnerConfig, OptimizerConfig
from gspo_dist.learners.loss import LossSpec
from gspo_dist.objectives.objective import get_objective
from gspo_dist.packing import MiniBatch, pack
from gspo_dist.types import Completion, LogprobOutput, PackedBatch, Prompt, Rollout
from gspo_dist.weights.stacks import unstack
from tests.parity.reads import by_expert, with_candidates, with_other_routers

VOCAB = 89
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {
        "num_hidden_layers": 2,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
    },
    "qwen3_5_moe_text": {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "nanochat": {"num_hidden_layers": 2, "final_logit_softcapping": 2.0},
}
"""Models of other families: layers that carry a state from token to token (the first three), a folder that
names experts in its own way and in another order, and a head whose logits are capped."""
BUDGETS = (64, 128, 34)
"""Token budgets of the first three mini-batches: each rank runs 2, 1 and 3 or more micro-batches."""
FILLED = 25
"""Tokens of every sequence of the last mini-batch, and its budget.

It has one sequence more than there are ranks, so it needs fillers.
"""

OTHER_OPTIMIZER = OptimizerConfig(
    lr=5e-3,
    betas=(0.6, 0.8),
    eps=1e-4,
    weight_decay=0.4,
    grad_clip=0.02,
    warmup_steps=1,
    schedule="cosine",
)
"""What a resume changes: every setting of `make_config`'s optimiser."""


def make_model(folder: Path, kind: str = "qwen3_moe", **changes: Any) -> Path:
    """A random model saved as HF saves it; norms and biases off their neutral values."""
    torch.manual_seed(11)
    model: PreTrainedModel
    if kind in OTHERS:
        dense = "num_experts" not in AutoConfig.for_model(kind).to_dict()
        sizes = {k: v for k, v in SIZES.items() if not (dense and "expert" in k)}
        config = AutoConfig.for_model(kind, **sizes | OTHERS[kind] | {"pad_token_id": None} | changes)
        model = AutoModelForCausalLM.from_config(config)
    elif kind == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES | {"head_dim": 8, "norm_topk_prob": True} | changes)
        )
    else:  # shared expert, gate weights not renormalised
        sizes = SIZES | {
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": False,
        }
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):  # what the router of LFM2-MoE chooses by
                buffer.normal_(std=0.2)
    model.float().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_rollouts(seed: int, count: int = 8, length: int | None = None) -> list[Rollout]:
    """Groups of two; completions of 4 to 24 tokens after prompts of 3 to 6, or `length` tokens in all."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        prompt = tuple(int(t) for t in rng.integers(0, VOCAB, rng.integers(3, 7)))
        n = int(rng.integers(4, 25)) if length is None else length - len(prompt)
        out.append(
            Rollout(
                100 * seed + i,
                i // 2,
                Prompt(str(i // 2), prompt, ""),
                Completion(
                    rng.integers(0, VOCAB, n),
                    np.ones(n, np.bool_),
                    np.full(n, -4.0, np.float32),
                    np.zeros(n, np.int32),
                    "length",
                    "",
                ),
                float(rng.integers(0, 2)),
            )
        )
    return out


def make_mini_batches(ranks: int = 2) -> list[MiniBatch]:
    """Four optimiser steps with different numbers of micro-batches, the last with fillers.

    Advantages have both signs.
    """
    out = []
    for step, budget in enumerate((*BUDGETS, FILLED)):
        rollouts = make_rollouts(step) if budget in BUDGETS else make_rollouts(step, ranks + 1, FILLED)
        advantages = np.random.default_rng(50 + step).normal(size=len(rollouts))
        out += pack(
            rollouts,
            advantages,
            replicas=ranks,
            token_budget=budget,
            mini_batches=1,
            max_completion_length=24,
            seed=(step,),
        )
    return out


def near_policy(learner: Any, mini_batches: list[MiniBatch]) -> list[MiniBatch]:
    """The mini-batches with engine log-probs a tenth of a nat off `learner`'s.

    Ratios then lie on both sides of the clip.
    """
    generator = torch.Generator().manual_seed(1)

    def attach(batch: PackedBatch, output: LogprobOutput) -> PackedBatch:
        noise = 0.1 * torch.randn(batch.num_tokens, generator=generator)
        return batch.with_(rollout_logprobs=torch.where(batch.loss_mask, output.logprobs + noise, 0.0))

    return [
        replace(
            m,
            micro_batches=tuple(
                tuple(attach(b, o) for b, o in zip(rank, learner.logprobs(rank), strict=True))
                for rank in m.micro_batches
            ),
        )
        for m in mini_batches
    ]


def make_spec(mini_batch: MiniBatch, kl_coef: float = 0.0, name: str = "gspo") -> LossSpec:
    """A clip range wide enough that the gradient comes from most sequences."""
    if name != "gspo":
        return LossSpec(get_objective(name), mini_batch.denominators)
    objective = get_objective("gspo", clip_low=0.5, clip_high=0.5, allow_wide_clip=True, kl_coef=kl_coef)
    return LossSpec(objective, mini_batch.denominators)


def make_config(world_size: int = 1, backend: str = "deepspeed", **changes: Any) -> LearnerConfig:
    """Clipping bites, the schedule moves; eps is large enough that Adam does not magnify rounding."""
    # ZeRO 3 makes a buffer of so many elements, and a nap copies it: two gigabytes by DeepSpeed's default.
    # All gradients of these models fit into either.
    config = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    deepspeed = DeepSpeedConfig(**{"config": config} | changes.pop("deepspeed", {}))
    optimizer = OptimizerConfig(
        lr=2e-3, weight_decay=0.1, grad_clip=0.05, warmup_steps=2, schedule="linear", eps=1e-6
    )
    settings = {"precision": "fp32", "token_budget": 128, "timeout_s": 60.0, "optimizer": optimizer} | changes
    return LearnerConfig(backend=backend, world_size=world_size, deepspeed=deepspeed, **settings)


def train(
    learner: Any,
    mini_batches: list[MiniBatch],
    ranks: list[int],
    kl_coef: float = 0.0,
    objectives: tuple[str, ...] = ("gspo",),
) -> list[dict[str, Any]]:
    """One optimiser step per mini-batch on the micro-batches of `ranks`, and what the learner said.

    objectives: those of the steps, over and over.
    """
    seen = []
    for i, mini_batch in enumerate(mini_batches):
        name = objectives[i % len(objectives)]
        mine = [b for r in ranks for b in mini_batch.micro_batches[r]]
        logprobs = learner.logprobs(mine, record_scores=name == "rspo")
        if name == "rspo":
            mine = [with_other_routers(b, o.router) for b, o in zip(mine, logprobs, strict=True)]
        if name == "score_centering":
            mine = [with_candidates(b, VOCAB) for b in mine]
        if kl_coef:
            refs = learner.logprobs(mine, reference=True)
            mine = [b.with_(ref_logprobs=o.logprobs) for b, o in zip(mine, refs, strict=True)]
        stats = learner.forward_backward(mine, make_spec(mini_batch, kl_coef, name))
        step = learner.optim_step()
        seen.append(
            {
                "logprobs": [o.logprobs for o in logprobs],
                "entropy": [o.entropy for o in logprobs],
                "router": [by_expert(o.router) for o in logprobs if o.router is not None],
                "stats": stats,
                "grad_norm": step.grad_norm,
                "lr": step.lr,
                "version": step.policy_version,
                "loss_scale": step.loss_scale,
            }
        )
    return seen


def exported(learner: Any, bucket_bytes: int = 1 << 14, **which: Any) -> dict[str, torch.Tensor]:
    """Every weight by its HF name, copied. which: the exporters, where they are not rank 0 alone."""
    out: dict[str, torch.Tensor] = {}
    for bucket in learner.weights(bucket_bytes, **which):
        for name, tensor in bucket:
            assert name not in out, f"{name} was exported twice"
            out[name] = tensor.clone()
    # What travels to the engines is the same in fewer tensors; the buffers are used again after each bucket.
    stacked: dict[str, torch.Tensor] = {}
    travelled = 0
    for bucket in learner.weights(bucket_bytes, stacked=True, **which):
        travelled += len(bucket)
        stacked.update({name: tensor.clone() for name, tensor in unstack(bucket)})
    assert stacked.keys() == out.keys()
    assert all(torch.equal(stacked[name], out[name]) for name in out)
    assert not any(".experts.0." in name for name in out) or travelled < len(out)
    return out
