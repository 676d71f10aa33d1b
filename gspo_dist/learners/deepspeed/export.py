"""Full weights under HF names from sharded engines, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist

from gspo_dist.learners.hf_model import PolicyModel
from gspo_dist.weights.names import FileNames, stored_tensors
from gspo_dist.weights.stacks import Stack, unstack
from gspo_dist.weights.stream import NamedTensor, buckets

HF_PROJECTION = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""AutoEP's names of the expert projections -> HF's."""
HF_MODULE = {
    ".router.gate.": ".gate.",
    ".shared_experts.": ".shared_expert.",
    ".shared_experts_gate.": ".shared_expert_gate.",
}
"""AutoEP's names of the other MoE modules -> HF's."""


def hf_name(name: str) -> str:
    """The engine's name of a parameter -> the file's.

    Example: `hf.model.layers.0.mlp.router.gate.weight` -> `model.layers.0.mlp.gate.weight`.
    """
    name = name.removeprefix("hf.")
    for ours, theirs in HF_MODULE.items():
        name = name.replace(ours, theirs)
    return name


def full_weights(
    policy: PolicyModel,
    *,
    rank: int,
    exporters: Sequence[int],
    bucket_bytes: int,
    zero: Any,
    stacked: bool = False,
) -> Iterator[NamedTensor]:
    """Full tensors on the exporting ranks, nothing on the others. Collective: every rank exhausts it.

    rank: this one.

    stacked: experts stay together where they are, as `weights.stacks` names them.

    zero: the `deepspeed.zero` module when parameters are partitioned (stage 3), else None.

    At most about `bucket_bytes` (or one parameter, where it is larger) is gathered at once.
    """
    exporter = rank in exporters
    experts: dict[str, tuple[torch.nn.Parameter, Any]] = {}
    for module_name, module in policy.named_modules():
        if getattr(module, "_is_autoep_layer", False):
            for w in HF_PROJECTION:
                experts[f"{module_name}.experts.{w}"] = (getattr(module.experts, w), module.ep_group)
    dense: list[NamedTensor] = [
        (name, parameter) for name, parameter in policy.named_parameters() if name not in experts
    ]
    # AutoEP replaced the modules whose names transformers knows; it serves models that name experts one
    # by one only.
    names = None if experts else FileNames(policy.hf)
    for part in buckets(dense, bucket_bytes, _full_bytes):
        tensors = _gather(part, zero)
        if exporter:
            for name, tensor in tensors:
                if names is None:
                    yield hf_name(name), tensor
                else:
                    name = name.removeprefix("hf.")
                    yield from names.split(name, tensor, slice_bytes=bucket_bytes, stacked=stacked)
        del tensors  # before the next part is gathered
    if exporter and names is not None:
        parameters = {name for name, _ in policy.hf.named_parameters()}
        for name, buffer in stored_tensors(policy.hf):
            if name not in parameters:  # buffers are whole on every rank
                yield from names.split(name, buffer)
    for name, (parameter, group) in experts.items():
        ((_, local),) = _gather([(name, parameter)], zero)
        stacks = _expert_stacks(hf_name(name), local, group, rank, exporters, bucket_bytes)
        yield from stacks if stacked else unstack(stacks)
        del local


def _full_bytes(parameter: torch.Tensor) -> int:
    """Under ZeRO 3 a parameter holds nothing between calls; `ds_numel` is DeepSpeed's note of its size."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _gather(part: list[NamedTensor], zero: Any) -> list[NamedTensor]:
    """The whole parameters, detached."""
    if zero is None:
        return [(name, parameter.detach()) for name, parameter in part]
    # The tensors outlive the block: on leaving it DeepSpeed drops its own reference only.
    with zero.GatheredParameters([parameter for _, parameter in part]):
        return [(name, parameter.detach()) for name, parameter in part]


def _expert_stacks(
    name: str,
    local: torch.Tensor,
    group: dist.ProcessGroup,
    rank: int,
    exporters: Sequence[int],
    bucket_bytes: int,
) -> Iterator[NamedTensor]:
    """local [E_local, ...] of this rank -> stacks of every expert on the exporters, some of each
    rank at a time.

    Rank r of an expert-parallel group holds experts r * E_local .. (r + 1) * E_local - 1. Example: 8 experts
    on 2 ranks, 2 at a time: 0, 1 (of rank 0), 4, 5 (of rank 1), then 2, 3, 6, 7. Only groups with an
    exporter take part, because the groups hold copies of each other.
    """
    members = dist.get_process_group_ranks(group)
    wanted = [exporter for exporter in exporters if exporter in members]
    if not wanted:
        return
    stem, _, leaf = name.rpartition(".")
    step = max(1, bucket_bytes // (len(members) * local[0].nbytes))
    for start in range(0, len(local), step):
        chunk = local[start : start + step].contiguous()
        shards = [torch.empty_like(chunk) for _ in members] if rank in wanted else None
        for exporter in wanted:
            dist.gather(chunk, shards if exporter == rank else None, dst=exporter, group=group)
        for place, shard in enumerate(shards or ()):
            first = place * len(local) + start
            yield Stack(stem, first, len(shard), (HF_PROJECTION[leaf],), ".weight").name, shard
