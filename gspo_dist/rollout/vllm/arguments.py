"""What the vLLM engine is told of its head and attention, and how many sequences it may decode at once."""

from __future__ import annotations

from typing import Any

from gspo_dist.config import RolloutConfig
from gspo_dist.models.shape import ModelShape, countable
from gspo_dist.planner.layout import EngineLayout
from gspo_dist.planner.memory import LEAST_SEQUENCES, sequences_at_once


def head_override(precision: str, *, fp32_head: bool) -> dict[str, Any]:
    """The entry of `hf_overrides` that gives the engine's head the learner's precision.

    vLLM 0.30 computes the logits of a bf16 model in bf16, which rounds a logit of 20 to a multiple of 1/8.
    With head_dtype float32 a GPU accumulates the same product into float32 (torch.mm with out_dtype). A CPU
    casts hidden states and weight at every call, which shows only with a large vocabulary.
    """
    if precision == "fp32":
        return {}
    return {"head_dtype": "float32" if fp32_head else "model"}


def attention_backend(device: str, *, batch_invariant: bool) -> dict[str, str]:
    """The entry that chooses the engine's attention. None: vLLM chooses, where no learner has to call it.

    That is the one whose kernel is Triton's (`learners/exact/gpu.py`), among those that vLLM 0.30 has for
    batch-invariant mode.
    """
    return {"attention_backend": "TRITON_ATTN"} if batch_invariant and device != "cpu" else {}


def max_num_seqs(config: RolloutConfig, shape: ModelShape, gpu_bytes: int | None) -> int:
    """rollout.max_num_seqs, or what stands for null: the planner's number on a GPU of `gpu_bytes`, and
    `LEAST_SEQUENCES` on a CPU host (gpu_bytes None) and for a model whose sizes the planner does not know.
    """
    if config.max_num_seqs is not None:
        return config.max_num_seqs
    if gpu_bytes is None:
        return LEAST_SEQUENCES
    try:
        return sequences_at_once(countable(shape), EngineLayout(config), config.max_model_len / 2, gpu_bytes)
    except ValueError:
        return LEAST_SEQUENCES
