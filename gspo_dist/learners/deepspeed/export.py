"""Full weights under HF names from sharded engines, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed as dist

from gspo_dist.weights.stream import NamedTensor, unfuse_experts

HF_PROJECTION = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
HF_MODULE = {
    ".router.gate.": ".gate.",
    ".shared_experts.": ".shared_expert.",
    ".shared_experts_gate.": ".shared_expert_gate.",
}
Named = tuple[str, torch.nn.Parameter]


def hf_name(name: str) -> str:
    """`hf.model.layers.0.mlp.router.gate.weight` (in the engine) -> `model.layers.0.mlp.gate.weight` (in a
    file)."""
    name = name.removeprefix("hf.")
    for ours, theirs in HF_MODULE.items():
        name = name.replace(ours, theirs)
    return name


def full_weights(
    policy: torch.nn.Module, *, exporter: bool, bucket_bytes: int, zero: Any
) -> Iterator[NamedTensor]:
    """Full tensors on the exporting rank (rank 0), nothing on the others. Collective: exhaust it on every
    rank.

    zero: the `deepspeed.zero` module when parameters are partitioned (stage 3), else None. At most about
    `bucket_bytes` (or one parameter, where it is larger) is gathered at once.
    """
    tied = bool(getattr(policy.hf.config, "tie_word_embeddings", False))
    dense: list[Named] = []
    experts: list[tuple[str, torch.nn.Parameter, Any]] = []
    for module_name, module in policy.named_modules():
        group = module.ep_group if getattr(module, "_is_autoep_layer", False) else None
        if group is not None:
            experts += [
                (f"{module_name}.experts.{w}", getattr(module.experts, w), group) for w in HF_PROJECTION
            ]
    sharded = {name for name, _, _ in experts}
    for name, parameter in policy.named_parameters():
        if name not in sharded and not (tied and name == "hf.lm_head.weight"):
            dense.append((name, parameter))
    for part in _parts(dense, bucket_bytes):
        tensors = _gather(part, zero)
        if exporter:
            for name, tensor in tensors:
                yield from unfuse_experts(hf_name(name), tensor)
        del tensors
    for name, parameter, group in experts:
        ((_, local),) = _gather([(name, parameter)], zero)
        yield from _expert_weights(hf_name(name), local, group, exporter, bucket_bytes)
        del local


def _bytes(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _parts(parameters: Iterable[Named], bucket_bytes: int) -> Iterator[list[Named]]:
    part: list[Named] = []
    size = 0
    for name, parameter in parameters:
        if part and size + _bytes(parameter) > bucket_bytes:
            yield part
            part, size = [], 0
        part.append((name, parameter))
        size += _bytes(parameter)
    if part:
        yield part


def _gather(part: list[Named], zero: Any) -> list[NamedTensor]:
    """The whole parameters. Under ZeRO-3 the tensors outlive the gathering: DeepSpeed drops its own
    reference only."""
    if zero is None:
        return [(name, parameter.detach()) for name, parameter in part]
    with zero.GatheredParameters([parameter for _, parameter in part]):
        return [(name, parameter.detach()) for name, parameter in part]


def _expert_weights(
    name: str, local: torch.Tensor, group: Any, exporter: bool, bucket_bytes: int
) -> Iterator[NamedTensor]:
    """local [E_local, ...] of this rank -> every expert's tensor on the exporter, some experts of each rank
    at a time.

    Rank r of an expert-parallel group holds experts r * E_local .. (r + 1) * E_local - 1. Only the
    exporter's group (ranks 0 .. expert_parallel - 1) takes part; the other groups hold copies.
    """
    members = dist.get_process_group_ranks(group)
    if 0 not in members:
        return
    stem, _, leaf = name.rpartition(".")
    step = max(1, bucket_bytes // (len(members) * local[0].nbytes))
    for start in range(0, len(local), step):
        chunk = local[start : start + step].contiguous()
        shards = [torch.empty_like(chunk) for _ in members] if exporter else None
        dist.gather(chunk, shards, dst=0, group=group)
        for rank, shard in enumerate(shards or ()):
            first = rank * len(local) + start
            for e, expert in enumerate(shard, start=first):
                yield f"{stem}.{e}.{HF_PROJECTION[leaf]}.weight", expert
