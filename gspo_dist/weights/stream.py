"""Weights as a stream of HF-named tensors in buckets: never two full copies in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

NamedTensor = tuple[str, torch.Tensor]


def buckets(
    weights: Iterable[NamedTensor],
    bucket_bytes: int,
    nbytes: Callable[[torch.Tensor], int] = lambda tensor: tensor.nbytes,
) -> Iterator[list[NamedTensor]]:
    """Groups tensors, in order, into lists of at most `bucket_bytes`; a larger tensor travels alone.

    nbytes: what a tensor counts. A sharded parameter counts what it will take once it is gathered.
    """
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + nbytes(tensor) > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += nbytes(tensor)
    if bucket:
        yield bucket


def hf_named_weights(hf: torch.nn.Module) -> Iterator[NamedTensor]:
    """The weights of an in-memory HF model under checkpoint names (one expert, one tensor), detached, not copied.

    transformers 5 fuses experts in memory (`experts.gate_up_proj` [E, 2I, H], `experts.down_proj` [E, H, I]); files
    and engines name them one by one (`experts.3.up_proj.weight`), which is what travels.
    """
    tied = bool(getattr(hf.config, "tie_word_embeddings", False))
    for name, parameter in hf.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        yield from unfuse_experts(name, parameter.detach())


def unfuse_experts(name: str, tensor: torch.Tensor, first_expert: int = 0) -> Iterator[NamedTensor]:
    """Splits a fused expert tensor into per-expert HF tensors (views); other tensors pass unchanged."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj" and tensor.dim() == 3:
        half = tensor.shape[1] // 2
        for e, expert in enumerate(tensor, start=first_expert):
            yield f"{stem}.{e}.gate_proj.weight", expert[:half]
            yield f"{stem}.{e}.up_proj.weight", expert[half:]
    elif leaf == "down_proj" and tensor.dim() == 3:
        for e, expert in enumerate(tensor, start=first_expert):
            yield f"{stem}.{e}.down_proj.weight", expert
    else:
        yield name, tensor
