"""Moves weights from HF files to this rank's parameters, and streams them out for sync and export."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from gspo_dist.learners.megatron.convert import GateUp, Split, TensorSource, rule_for
from gspo_dist.models.shape import ModelShape
from gspo_dist.weights.stacks import Stack, stack_of

_EXPERT = re.compile(r"(local_experts\.|linear_fc[12]\.weight)(\d+)")


@dataclass(frozen=True)
class Entry:
    """One parameter of this rank."""

    name: str
    """Its global name, which numbers layers over all stages and experts over all ranks."""
    layer: int
    """Its layer in the whole model, -1 outside the layers."""
    expert: int | None
    """Its expert in the whole model, None outside the experts."""
    split: bool
    """Whether tensor ranks hold different parts of it."""
    shape: tuple[int, ...]
    """Of this rank's part."""
    dtype: torch.dtype
    """As it is held and sent."""

    @property
    def kind(self) -> tuple[str, bool]:
        """What may travel together: the same parameter of all experts of a layer."""
        return _EXPERT.sub(r"\1*", self.name) if self.expert is not None else self.name, self.split


def named_parameters(chunks: Sequence[Any], model: ModelShape) -> Iterator[tuple[Entry, Tensor]]:
    """This rank's parameters under global names, chunk after chunk.

    Example: expert rank 1 of 2 with 8 experts and pipeline stage 1 of 2 with 4 layers calls its
    decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight
    decoder.layers.2.mlp.experts.local_experts.7.linear_fc1.weight.
    """
    first_expert = 0
    if model.moe_layers:
        first_expert = mpu.get_expert_model_parallel_rank() * (
            model.num_experts // mpu.get_expert_model_parallel_world_size()
        )
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            layer, expert = -1, None
            if name.startswith("decoder.layers."):
                local = int(name.split(".")[2])
                layer = chunk.decoder.layers[local].layer_number - 1
                name = name.replace(f"decoder.layers.{local}.", f"decoder.layers.{layer}.", 1)
            found = _EXPERT.search(name) if ".experts." in name else None
            if found:
                expert = first_expert + int(found[2])
                name = name[: found.start(2)] + str(expert) + name[found.end(2) :]
            split = rule_for(name, model).sharded
            yield Entry(name, layer, expert, split, tuple(parameter.shape), parameter.dtype), parameter


@torch.no_grad()
def load_weights(chunks: Sequence[nn.Module], source: TensorSource, model: ModelShape) -> None:
    """Fills this rank's parameters from HF tensors, one at a time, reading only what the rank owns.

    Raises ValueError for a tensor that is missing or has another shape than the config promises.
    """
    for entry, parameter in named_parameters(chunks, model):
        if entry.expert is None:
            rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        else:
            rank, size = mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
        shard = rule_for(entry.name, model).load(source, rank, size)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"model.path: {entry.name} should be {list(parameter.shape)} on this rank by config.json: "
                f"its weights give {list(shard.shape)}; the folder's config and weights are of different "
                "models"
            )
        parameter.copy_(shard)


@torch.no_grad()
def export_weights(
    chunks: Sequence[nn.Module],
    model: ModelShape,
    bucket_bytes: int,
    exporters: Sequence[int] = (0,),
    *,
    stacked: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Streams HF-named full tensors on the ranks `exporters`.

    stacked: experts stay together where they can, as `weights.stacks` names them.

    Collective: all ranks take part, and the others yield nothing.

    In each step the same parameter of some experts, or one other parameter, is stacked. It is
    gathered over the tensor or the expert ranks of one stage, and sent down the pipeline. About
    `bucket_bytes` are in flight.

    Raises RuntimeError when two parameters map to one HF name.
    """
    mine = list(named_parameters(chunks, model))
    pipeline = mpu.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(stages, [entry for entry, _ in mine], group=pipeline)
    local = {entry.name: parameter for entry, parameter in mine}
    # The ranks of this rank's pipeline: one per stage, with the same other coordinates.
    line = dist.get_process_group_ranks(pipeline)
    heads = {exporter: _pipeline_of(exporter) for exporter in exporters}
    exported: set[str] = set()
    for stage, entries in enumerate(stages):
        for group_of in _steps(entries, bucket_bytes):
            if model.tied and group_of[0].name == "output_layer.weight":
                continue  # the last stage's copy of the embedding
            gathered = None
            # A group that holds the heads of two exporters gathers once: its ranks all see that it did.
            for exporter in exporters:
                if gathered is None and stage == mpu.get_pipeline_model_parallel_rank():
                    gathered = _gather(group_of, local, heads[exporter][stage])
            if len(line) > 1 and any(exporter in line for exporter in exporters):
                gathered = _send_down(gathered, group_of, line[stage], pipeline)
            if dist.get_rank() in exporters and gathered is not None:
                for name, tensor in _to_hf(group_of, gathered, model, stacked):
                    if name in exported:
                        raise RuntimeError(
                            f"weight {name} was exported twice: two megatron parameters map to it"
                        )
                    exported.add(name)
                    yield name, tensor


def streamed(chunks: Sequence[nn.Module], model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes that `export_weights` streams where one rank has the whole model.

    Its parameters may be on meta.
    """
    for entry, parameter in named_parameters(chunks, model):
        if not (model.tied and entry.name == "output_layer.weight"):
            for name, tensor in rule_for(entry.name, model).export([parameter.detach()]):
                yield name, tuple(tensor.shape)


def _pipeline_of(rank: int) -> list[int]:
    """The ranks of `rank`'s pipeline, first stage first.

    Example: ranks 1 and 3 for rank 1 of 4 in two stages.

    The ranks of one stage are consecutive in 0.16.1's order.
    """
    per_stage = dist.get_world_size() // mpu.get_pipeline_model_parallel_world_size()
    return [rank % per_stage + s * per_stage for s in range(mpu.get_pipeline_model_parallel_world_size())]


def _steps(entries: list[Entry], bucket_bytes: int) -> Iterator[list[Entry]]:
    """Groups entries of one kind, as many as fit the bucket once gathered, and at least one."""
    kinds: dict[tuple[str, bool], list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    for members in kinds.values():
        one = members[0]
        width = _group(one).size() if one.expert is not None or one.split else 1
        nbytes = torch.Size(one.shape).numel() * one.dtype.itemsize * width
        most = max(1, bucket_bytes // nbytes)
        for start in range(0, len(members), most):
            yield members[start : start + most]


def _group(entry: Entry) -> Any:
    """The ranks that hold parts of `entry` and of its siblings on other expert ranks."""
    if entry.expert is None:
        return mpu.get_tensor_model_parallel_group()
    return mpu.get_expert_tensor_and_model_parallel_group()


def _gather(entries: list[Entry], local: dict[str, Tensor], head: int) -> Tensor | None:
    """[ranks, entries, ...]: the shards of all ranks that hold a part.

    None on ranks whose group is not `head`'s.

    Entries are named by the head's experts. Another expert rank finds none of these names among its own, and
    sends the experts in the same places.
    """
    group = _group(entries[0])
    gathers = entries[0].expert is not None or entries[0].split
    if head not in (dist.get_process_group_ranks(group) if gathers else [head]) or (
        not gathers and dist.get_rank() != head
    ):
        return None
    stack = torch.stack([local[entry.name].detach() for entry in entries])
    if not gathers or group.size() == 1:
        return stack[None]
    out = stack.new_empty(group.size(), *stack.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1), stack, group=group)
    return out


def _send_down(gathered: Tensor | None, entries: list[Entry], source: int, pipeline: Any) -> Tensor:
    """What rank `source` gathered, on every rank of its pipeline."""
    if gathered is None:
        one = entries[0]
        width = _group(one).size() if one.expert is not None or one.split else 1
        gathered = torch.empty(
            width, len(entries), *one.shape, dtype=one.dtype, device=torch.cuda.current_device()
        )
    dist.broadcast(gathered, src=source, group=pipeline)
    return gathered


def _to_hf(
    entries: list[Entry], gathered: Tensor, model: ModelShape, stacked: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """HF names and full tensors of gathered entries [ranks, entries, ...].

    Example: 8 experts over 2 expert ranks, entries of experts 0 and 1. Row 0 of `gathered` holds experts 0
    and 1, and row 1 holds experts 4 and 5.
    """
    first = entries[0]
    if first.expert is None:
        for i, entry in enumerate(entries):
            yield from rule_for(entry.name, model).export(list(gathered[:, i]))
        return
    parts = mpu.get_expert_tensor_parallel_world_size()
    ranks = mpu.get_expert_model_parallel_world_size()
    each = model.num_experts // ranks
    for rank in range(ranks):
        if stacked and parts == 1:
            stack = _stack(entries, gathered[rank], rank * each, each, model)
            if stack is not None:
                yield stack.name, gathered[rank]
                continue
        for i, entry in enumerate(entries):
            expert = rank * each + entry.expert % each
            name = _EXPERT.sub(rf"\g<1>{expert}", entry.name)
            yield from rule_for(name, model).export(list(gathered[rank * parts : (rank + 1) * parts, i]))


def _stack(entries: list[Entry], shard: Tensor, first: int, each: int, model: ModelShape) -> Stack | None:
    """The stack of one expert rank's `shard` [entries, rows, ...].

    None where the experts do not follow each other, or where the folder does not hold an expert's rows in
    order and uncut, as it does for those of a stack.
    """
    experts = [first + (entry.expert or 0) % each for entry in entries]
    if experts != list(range(experts[0], experts[0] + len(experts))) or shard.dim() != 3:
        return None
    rule = rule_for(_EXPERT.sub(rf"\g<1>{experts[0]}", entries[0].name), model)
    if isinstance(rule, GateUp):  # of one tensor rank: the gate's rows, then the up's
        return stack_of([rule.gate, rule.up], len(experts))
    return stack_of([rule.hf], len(experts)) if isinstance(rule, Split) else None
