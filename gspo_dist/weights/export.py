"""A stream of HF-named weights as an HF folder: safetensors shards, their index, and the source's config and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gspo_dist.weights.stream import NamedTensor, buckets

SHARD_BYTES = 4 << 30
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")


def write_hf_folder(
    weights: Iterable[NamedTensor],
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes `target`, one shard in memory at a time; returns the number of tensors. The folder appears whole.

    source: the model folder whose config and tokenizer files are copied. dtype: of the written tensors (null: as
    streamed). Raises ValueError when `target` exists and is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"the folder to export to must be new or empty: {target} is not")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    skip = shutil.ignore_patterns(*WEIGHT_FILES)
    shutil.copytree(source, partial, ignore=skip)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(buckets(weights, shard_bytes), start=1):
        name = f"model-{number:05d}.safetensors"
        # contiguous clones: streamed tensors may be views of one fused parameter, which safetensors refuses
        tensors = {key: t.to(dtype or t.dtype).detach().cpu().contiguous().clone() for key, t in shard}
        save_file(tensors, partial / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
    (partial / "model.safetensors.index.json").write_text(text + "\n")
    if target.exists():
        target.rmdir()
    os.replace(partial, target)
    return len(index)
