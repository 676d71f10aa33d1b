"""Builds a ZeRO-3 model that is partitioned from its first parameter on and filled one parameter at a time.

`from_pretrained` holds the whole model in the memory of every rank. So it does with transformers' own ZeRO-3
switch, which fuses the experts of the whole checkpoint before it partitions. A host of eight ranks does not
have that memory for a model that ZeRO-3 is worth using for.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gspo_dist.learners.attention import NAME

FILE = "model.safetensors"


class Checkpoint:
    """Tensors of an HF folder by the names of its files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str]
        index = folder / f"{FILE}.index.json"
        if index.is_file():
            self.files = json.loads(index.read_text())["weight_map"]
        else:
            names = sorted(p.name for p in folder.glob("*.safetensors"))
            self.files = {}
            for name in names:
                with self._open(name) as file:
                    self.files |= dict.fromkeys(file.keys(), name)

    def _open(self, name: str) -> AbstractContextManager[Any]:
        return safe_open(self.folder / name, framework="pt")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._open(self.files[name]) as file:
            return file.get_tensor(name)


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


def copy_into(target: torch.Tensor, name: str, checkpoint: Checkpoint) -> None:
    """Fills the full parameter `name`. Raises ValueError, naming it, when the folder does not hold it."""
    if name in checkpoint:
        target.copy_(checkpoint[name])
        return
    parts = expert_parts(name, target.shape)
    missing = [part for part, _ in parts if part not in checkpoint] if parts else [name]
    if missing:
        raise ValueError(
            f"model.path lacks the weights {missing[:3]}: {checkpoint.folder} does not hold this model"
        )
    for part, at in parts:
        target[at].copy_(checkpoint[part])


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
    hf.tie_weights()  # zero.Init had made the tied head a parameter of its own
    _renew_rotary(hf)
    checkpoint = Checkpoint(folder) if dist.get_rank() == 0 else None
    error: ValueError | None = None
    for name, parameter in hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if checkpoint is not None and error is None:
                try:
                    copy_into(parameter.data, name, checkpoint)
                except ValueError as raised:
                    error = raised  # told to all ranks below: a rank that left now would hang the others
    errors: list[ValueError | None] = [error]
    dist.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise errors[0]
    return hf
