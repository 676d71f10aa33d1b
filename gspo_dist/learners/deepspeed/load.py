"""Builds a ZeRO-3 model that is partitioned from its first parameter on and filled one parameter at a time.

`from_pretrained` holds the whole model in the memory of every rank. So it does with transformers' own ZeRO-3
switch, which fuses the experts of the whole checkpoint before it partitions. A host of eight ranks does not
have that memory for a model that ZeRO-3 is worth using for.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gspo_dist.learners.attention import NAME
from gspo_dist.learners.hf_folder import check_loaded
from gspo_dist.weights.folder import ModelFolder


def expert_parts(name: str, shape: torch.Size) -> list[tuple[str, tuple[int, slice]]]:
    """The names in a file of a fused expert parameter's parts, and where each goes; nothing for others.

    Example: `mlp.experts.gate_up_proj` [E, 2 I, H] holds `mlp.experts.3.up_proj.weight` at [3, I:].
    """
    stem, _, leaf = name.rpartition(".")
    if len(shape) != 3 or leaf not in ("gate_up_proj", "down_proj"):
        return []
    if leaf == "down_proj":
        return [(f"{stem}.{e}.down_proj.weight", (e, slice(None))) for e in range(shape[0])]
    half = shape[1] // 2
    rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
    return [(f"{stem}.{e}.{part}.weight", (e, at)) for e in range(shape[0]) for part, at in rows.items()]


def copy_into(target: torch.Tensor, name: str, weights: ModelFolder) -> list[str]:
    """Fills the full parameter `name` and returns the tensors that it was made of.

    Raises ValueError, naming what is missing, when the folder does not hold it.
    """
    if name in weights.tensors:
        target.copy_(weights.read(name))
        return [name]
    parts = expert_parts(name, target.shape)
    missing = [part for part, _ in parts if part not in weights.tensors] if parts else [name]
    check_loaded(weights.path, missing, [])
    for part, at in parts:
        target[at].copy_(weights.read(part))
    return [part for part, _ in parts]


def _renew_rotary(hf: nn.Module) -> None:
    """Builds the rotary tables again: zero.Init had rounded them to the weights' precision."""
    device = next(buffer for buffer in hf.buffers()).device
    for name, module in list(hf.named_modules()):
        if not list(module.buffers(recurse=False)):
            continue
        if list(module.parameters()) or "Rotary" not in type(module).__name__:
            raise ValueError(
                f"ZeRO 3 needs a model whose only buffers are rotary tables: {name} is a "
                f"{type(module).__name__}; set learner.deepspeed.zero_stage=2"
            )
        hf.set_submodule(name, type(module)(config=hf.config).to(device))


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
    _renew_rotary(hf)
    weights = source if dist.get_rank() == 0 else None
    read: set[str] = set()
    error: ValueError | None = None
    for name, parameter in hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if weights is not None and error is None:
                try:
                    read.update(copy_into(parameter.data, name, weights))
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
