"""The weights of a Megatron checkpoint under HF names, read by one process that builds no model.

Every weight lies in the files under its global name, with its place in the whole. So nobody has to know the
layout that saved it. Optimiser states lie in the same files and are passed over. At most one expert, or one
other tensor twice, is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gspo_dist.learners.megatron.convert import rule_for
from gspo_dist.models.shape import ModelShape
from gspo_dist.weights.stream import NamedTensor

_EXPERTS = ".mlp.experts.experts."
"""In the names of a tensor that holds all experts of a layer, [experts, ...]."""


class _Into(DefaultLoadPlanner):
    """Tells the reader where in `target` each piece belongs."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self.target
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dim, start, size)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was read in place."""


def read_finished(folder: Path) -> Metadata:
    """What a checkpoint says of its tensors: names, shapes, and where in which file each piece lies.

    ValueError: the checkpoint is unfinished, or a file of it is missing.
    """
    if not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{folder} is not a finished megatron checkpoint: it has no metadata.json; resume from another"
        )
    metadata = FileSystemReader(str(folder)).read_metadata()
    files = sorted({place.relative_path for place in (metadata.storage_data or {}).values()})
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {folder} lacks {len(missing)} of its {len(files)} shards: {', '.join(missing[:4])}; "
            "copy it again or resume from another"
        )
    return metadata


def stored_weights(folder: Path, model: ModelShape) -> Iterator[NamedTensor]:
    """Streams the weights that `checkpoint.save` wrote to `folder`, as its learner would export them.

    model: which model they are.

    Raises ValueError as `read_finished` does, and for a tensor that `model` does not have.
    """
    metadata = read_finished(folder)
    reader = FileSystemReader(str(folder))
    reader.set_up_storage_reader(metadata, False)
    tensors = {
        name: stored
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and _is_weight(name)
    }
    for name in sorted(tensors, key=_layer):
        stored = tensors[name]
        if _EXPERTS not in name:
            tensor = _read(reader, name, stored, (0,) * len(stored.size), tuple(stored.size))
            yield from rule_for(name, model).export([tensor])
            continue
        one = (1, *stored.size[1:])
        for expert in range(stored.size[0]):
            tensor = _read(reader, name, stored, (expert, *(0,) * (len(one) - 1)), one)
            alone = name.replace(_EXPERTS, f".mlp.experts.local_experts.{expert}.")
            yield from rule_for(alone, model).export([tensor[0]])


def _is_weight(name: str) -> bool:
    """Neither an optimiser's state nor the bias by which a router's choices are balanced.

    The bias belongs to the training: it is not streamed, and the folder has no place for it.
    """
    return not name.startswith("optimizer.") and not name.endswith(".router.expert_bias")


def _layer(name: str) -> tuple[int, str]:
    """Sorts a model's tensors layer by layer."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def _read(
    reader: FileSystemReader,
    name: str,
    stored: TensorStorageMetadata,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """A box of a stored tensor. Only the pieces that overlap it are read."""
    target = torch.empty(sizes, dtype=stored.properties.dtype)
    box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    items = create_read_items_for_chunk_list(name, stored, [box])
    reader.read_data(LoadPlan(items), _Into(target)).wait()
    return target
