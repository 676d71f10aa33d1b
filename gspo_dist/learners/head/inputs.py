"""What the head refuses: shapes, dtypes, devices, ids and numbers, each by its name
and before any arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensors(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless hidden [N, H], weight [V, H], token_ids [N] and bias [V] fit each other."""
    _check_shapes(hidden, weight, token_ids, bias)
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point: got {hidden.dtype}")
    _same_device("token_ids", token_ids, hidden)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        _same_device(name, parameter, hidden)
        if parameter.dtype != hidden.dtype:
            raise ValueError(
                f"{name} must have hidden's dtype: got {parameter.dtype} and {hidden.dtype}; cast hidden to "
                "the head's dtype (for float32 logits of 16-bit parameters use fp32_head=True)"
            )


def _check_shapes(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H]: got {list(hidden.shape)} and {list(weight.shape)}; "
            "flatten the batch, and pass the LM head's weight as torch.nn.Linear stores it"
        )
    integers = not (token_ids.is_floating_point() or token_ids.is_complex())
    if token_ids.shape != hidden.shape[:1] or not integers:
        raise ValueError(
            f"token_ids must be integers [N], one for each row of hidden: got {list(token_ids.shape)} of "
            f"{token_ids.dtype} for {hidden.shape[0]} rows"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [V], one for each row of weight: got {list(bias.shape)} for {len(weight)} rows"
        )


def _same_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on hidden's device: got {tensor.device} and {hidden.device}")


def check_numbers(
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_tokens: int | None,
    kept_bytes: int | None,
) -> None:
    """Raises ValueError for a temperature, a scale, a cap, a chunk or a budget that no head can have."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be positive and finite: got {temperature}; greedy sampling has no log-prob"
        )
    for name, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(
                f"{name} must be positive and finite: got {value}; correct the model's config.json"
            )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1: got {chunk_tokens}; None chooses it")
    if kept_bytes is not None and kept_bytes < 0:
        raise ValueError(f"kept_bytes must be at least 0: got {kept_bytes}; 0 keeps no logits, None chooses")


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError unless every id names a row of a whole (not split) weight."""
    if ids.numel():
        # one transfer for both ends of the range: each is a synchronisation with the GPU
        lowest, highest = torch.stack(ids.aminmax()).tolist()
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(
                f"token_ids must be in [0, {vocabulary}), the rows of weight: got {lowest}..{highest}; "
                "drop padding and masked tokens before the head"
            )


def check_all_taken(taken: Tensor, ids: Tensor) -> None:
    """Raises ValueError for ids that no rank's shard of the vocabulary holds.

    taken [N]: the logit of each id over all ranks, -inf where none had it. Every rank sees the same `taken`,
    so all of them raise or none does.
    """
    missed = ids[taken == -torch.inf]
    if missed.numel():
        raise ValueError(
            f"token_ids must be a row of some rank's weight shard: got {missed[:8].tolist()}; check "
            "vocab_parallel.start of every rank, and drop padding and masked tokens before the head"
        )
