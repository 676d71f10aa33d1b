"""Builds a ZeRO-3 model that is partitioned from its first parameter on and filled one parameter at a time.

`from_pretrained` holds the whole model in the memory of every rank. So it does with transformers' own ZeRO-3
switch, which fuses the experts of the whole checkpoint before it partitions. A host of eight ranks does not
have that memory for a model that ZeRO-3 is worth using for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gspo_dist.learners.attention import NAME
from gspo_dist.learners.hf_folder import check_loaded
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames, stored_tensors


@dataclass(frozen=True)
class Part:
    """A piece of a parameter that the folder holds as a tensor of its own."""

    file: str
    """Its name in the folder."""
    row: int | None
    """The row of the parameter that it belongs to: an expert. None: the whole."""
    index: torch.Tensor
    """[n] int64: the place in that row, flattened, of each of its elements."""


def parts(name: str, shape: torch.Size, names: FileNames) -> Iterator[Part]:
    """What of a folder a parameter is made of, where the folder holds it under another name or form.

    transformers says only how a parameter is taken apart to be saved. So the numbers of its elements are
    taken apart, for one expert where the folder holds experts one by one, and say where each piece belongs.

    Example: `mlp.experts.gate_up_proj` [E, 2 I, H] has `mlp.experts.3.up_proj.weight` in row 3, at the
    elements I H to 2 I H - 1. Raises ValueError where the folder joins it with other parameters.
    """
    one = torch.arange(shape[1:].numel()).view(1, *shape[1:])
    try:
        first = list(names.split(name, one))
    except ValueError:  # not expert by expert, so whole
        whole = torch.arange(shape.numel()).view(shape)
        yield from (Part(file, None, index.flatten()) for file, index in names.split(name, whole))
        return
    for expert in range(shape[0]):
        # Their places are those of expert 0, so a blank is enough to ask for the names.
        files = names.split(name, torch.empty_like(one, device="meta"), expert)
        for (file, _), (_, index) in zip(files, first, strict=True):
            yield Part(file, expert, index.flatten())


def copy_into(target: torch.Tensor, name: str, weights: ModelFolder, names: FileNames) -> list[str]:
    """Fills the full parameter `name` and returns the tensors that it was made of.

    Raises ValueError, naming what is missing, when the folder does not hold it.
    """
    if name in weights.tensors:
        target.copy_(weights.read(name))
        return [name]
    if name in names.unchanged:
        check_loaded(weights.path, [name], [])
    found = list(parts(name, target.shape, names))
    check_loaded(weights.path, [part.file for part in found if part.file not in weights.tensors], [])
    for part in found:
        row = (target if part.row is None else target[part.row]).view(-1)
        row[part.index.to(target.device)] = weights.read(part.file).to(target).flatten()
    return [part.file for part in found]


def _renew_buffers(hf: PreTrainedModel, weights: ModelFolder | None) -> set[str]:
    """Gives the buffers their values; returns the names of those that a folder holds.

    Rotary tables are built again, because zero.Init had rounded them to the weights' precision. What the
    folder holds (the bias that routers choose by) is read by rank 0, which has `weights`, for all ranks.

    Collective. Raises ValueError on every rank for a buffer of another kind.
    """
    stored = {name for name, _ in stored_tensors(hf)} - {name for name, _ in hf.named_parameters()}
    device = next(buffer for buffer in hf.buffers()).device
    precise = tuple(getattr(hf, "_keep_in_fp32_modules_strict", None) or ())
    for name, module in list(hf.named_modules()):
        own = dict(module.named_buffers(recurse=False))
        kept = {leaf for leaf in own if f"{name}.{leaf}" in stored}
        for leaf in sorted(kept):
            buffer = own[leaf].float() if leaf.endswith(precise) else own[leaf]
            if weights is not None and f"{name}.{leaf}" in weights.tensors:
                buffer.copy_(weights.read(f"{name}.{leaf}"))
            dist.broadcast(buffer, 0)
            setattr(module, leaf, buffer)
        if len(kept) == len(own):
            continue
        if list(module.parameters()) or "Rotary" not in type(module).__name__:
            raise ValueError(
                "ZeRO 3 needs a model whose only buffers are rotary tables and what its folder holds: "
                f"{name} is a {type(module).__name__}; set learner.deepspeed.zero_stage=2"
            )
        hf.set_submodule(name, type(module)(config=hf.config).to(device))
    return stored


def load_partitioned(
    deepspeed: ModuleType,
    settings: dict[str, Any],
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The HF causal LM of `folder`, its parameters partitioned over all ranks. Rank 0 reads the files.

    settings: the engine's configuration.

    Collective. Raises ValueError on every rank when weights are missing.
    """
    # Without `dtype`, which zero.Init gets wrong on hosts without fp16 (0.19.8); the settings name it. Its
    # "memory efficient" linear layer would replace torch's in the whole process.
    with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False), no_init_weights():
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    source = ModelFolder(folder)
    if source.tied:
        hf.tie_weights()  # zero.Init had made the tied head a parameter of its own
    weights = source if dist.get_rank() == 0 else None
    read = _renew_buffers(hf, weights)
    names = FileNames(hf)
    error: ValueError | None = None
    if weights is not None:
        try:
            check_loaded(folder, read - set(weights.tensors), [])
        except ValueError as raised:
            error = raised
    for name, parameter in hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if weights is not None and error is None:
                try:
                    read.update(copy_into(parameter.data, name, weights, names))
                except ValueError as raised:
                    error = raised  # told to all ranks below: a rank that left now would hang the others
    if weights is not None and error is None:
        try:
            check_loaded(folder, [], weights.streamed - read)
        except ValueError as raised:
            error = raised
    errors: list[ValueError | None] = [error]
    dist.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise errors[0]
    return hf
