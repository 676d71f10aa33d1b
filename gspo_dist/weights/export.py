"""A learner's weights as an HF folder, read back and compared before anybody can use it."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from gspo_dist.files import whole_folder
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.folder import ModelFolder, read_folder
from gspo_dist.weights.shards import ShardWriter
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.verify import WeightSyncError, check_probe

SHARD_BYTES = 4 << 30
"""Bytes of a weight file at most. A larger tensor has a file of its own."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")

log = logging.getLogger(__name__)


def write_hf_folder(weights: Iterable[NamedTensor], source: Path, target: Path) -> int:
    """Writes `target` from a learner's stream. Returns the number of tensors that the learner brought.

    source: the folder that the run started from. Its config and tokenizer are copied, and the weights must be
    exactly its tensors by name and shape. Tensors of it that transformers does not load are copied unchanged,
    which is logged. A tied head that the source holds beside the embedding is written again beside it.

    The folder is written beside `target`, read back, compared with what was streamed (names, dtypes,
    shapes, checksums), and only then appears, whole. ValueError: `target` is not empty, or there is no
    room. WeightSyncError: a tensor is missing, has no place in the source, or reads back otherwise. Nothing
    is left behind then.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"the folder to export to must be new or empty: {target} is not")
    folder = ModelFolder(source)
    with whole_folder(target) as partial:
        with _room(target.parent):
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
            sent = _write_shards(weights, folder, partial)
        verify_folder(partial, sent)
    return len(sent) - len(set(sent) - folder.streamed)


@contextlib.contextmanager
def _room(parent: Path) -> Iterator[None]:
    """Around whatever writes below `parent`. Raises ValueError on a full disk. Other errors pass."""
    try:
        yield
    except OSError as error:
        # copytree collects its files' errors as texts.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        free = shutil.disk_usage(parent).free
        raise ValueError(
            f"no room for the export: {parent} has {free / 2**20:.0f} MiB free; make room or export to "
            "another disk"
        ) from error


def _write_shards(weights: Iterable[NamedTensor], folder: ModelFolder, target: Path) -> dict[str, int]:
    """Writes the stream and what the source adds to it. Returns the checksum of every tensor written.

    One tensor is in memory at a time.
    """
    sent: dict[str, int] = {}
    writer = ShardWriter(target, SHARD_BYTES, folder.tensors)

    def write(name: str, tensor: torch.Tensor) -> None:
        # Streamed tensors may be views of one fused parameter.
        tensor = tensor.detach().cpu().contiguous()
        if not sent:
            _check_room(folder, tensor.dtype, target)
        sent[name] = host_checksum(tensor)
        writer.add(name, tensor)

    try:
        for name, tensor in weights:
            folder.check_shapes({name: tuple(tensor.shape)}, "the export")
            if name in sent:
                raise WeightSyncError(f"the learner exported {name} twice")
            write(name, tensor)
            if folder.twin is not None and name == folder.twin[1]:
                write(folder.twin[0], tensor)
            del tensor  # before the next one is made
        folder.check_whole(sent, "the export")
        kept = sorted(folder.ignored - set(sent))
        if kept:
            log.warning(
                "%d tensors that transformers does not load are copied from %s unchanged: %s ...",
                len(kept),
                folder.path,
                kept[0],
            )
        for name in kept:
            write(name, folder.read(name))
        writer.close()
    finally:
        writer.abandon()
    return sent


def _check_room(folder: ModelFolder, dtype: torch.dtype, target: Path) -> None:
    """ValueError where the source's tensors, stored as `dtype`, would not fit on the disk of `target`."""
    needed = sum(math.prod(tensor.shape) for tensor in folder.tensors.values()) * dtype.itemsize
    free = shutil.disk_usage(target).free
    if free < needed:
        raise ValueError(
            f"no room for the export: it takes about {needed / 2**20:.0f} MiB, and {target.parent} has "
            f"{free / 2**20:.0f} MiB free; make room or export to another disk"
        )


def verify_folder(folder: Path, sent: dict[str, int]) -> None:
    """Reads a written folder back. WeightSyncError: its tensors are not those of `sent`
    (name -> `host_checksum`).
    """
    stored = read_folder(folder)
    odd = sorted(set(stored) ^ set(sent))
    if odd:
        raise WeightSyncError(
            f"the export reads back with other tensors than were written, among them {odd[0]}"
        )
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(folder / file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                if host_checksum(f.get_tensor(name)) != sent[name]:
                    raise WeightSyncError(
                        f"{name} reads back from {folder / file} with other bytes: check the disk"
                    )


@torch.no_grad()
def probe_folder(
    folder: Path,
    sequences: Sequence[tuple[np.ndarray, int]],
    learner_logprobs: Sequence[np.ndarray],
    tolerance: float,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Compares the learner's log-probs with those of transformers' own forward over an exported folder.

    sequences: (token ids, where the compared part starts), as the probe of a weight sync has them.
    learner_logprobs: of the tokens from there on. dtype: in which the folder is computed, best the learner's
    own. Returns mean and largest |difference| in nats.

    WeightSyncError: the folder lacks weights that transformers needs or holds others, or the
    mean passes `tolerance`.
    """
    from transformers import AutoModelForCausalLM

    hf, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if loaded[fault]:
            raise WeightSyncError(
                f"transformers reads {folder} with {len(loaded[fault])} {fault.replace('_', ' ')}: "
                f"{sorted(map(str, loaded[fault]))[0]}"
            )
    hf.eval()
    theirs = []
    for tokens, start in sequences:
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        table = (hf(ids[None], use_cache=False).logits[0].float() / temperature).log_softmax(-1)
        first = max(1, start)  # the first token has no log-prob
        theirs.append(table[first - 1 : -1].gather(1, ids[first:, None])[:, 0].numpy())
    return check_probe(theirs, learner_logprobs, tolerance, engine=f"the exported folder {folder.name}")
