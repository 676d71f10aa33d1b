"""What a model folder holds: names, dtypes and shapes, read from the heads of its safetensors files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gspo_dist.weights.verify import WeightSyncError

HEAD_LIMIT = 100 << 20
"""Bytes. A longer head is no safetensors file but something that was read as one."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a folder."""

    dtype: str
    """safetensors' name of it: "BF16"."""
    shape: tuple[int, ...]
    """Its shape."""
    file: str
    """The file of the folder that holds it."""


def read_head(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. ValueError, with the file's name: it is torn or no such
    file at all.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size - 8, HEAD_LIMIT):  # also where the file has less than the 8 bytes
            raise ValueError(
                f"weight file {path} is torn: it has {size} bytes, and its head alone would need "
                f"{length + 8}; copy the file again"
            )
        try:
            head: dict[str, Any] = json.loads(f.read(length))
        except ValueError:
            raise ValueError(
                f"weight file {path} is no safetensors file: its head is not JSON; copy it again"
            ) from None
    head.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in head.values()), default=0)
    if size != needed:
        raise ValueError(
            f"weight file {path} is torn: its head describes {needed} bytes, and it has {size}; copy it again"
        )
    return {name: StoredTensor(e["dtype"], tuple(e["shape"]), path.name) for name, e in head.items()}


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name. Reads heads only, so the size of the model does not matter.

    ValueError: no safetensors files, a torn one, or an index that names files or tensors which are not there.
    """
    index = folder / "model.safetensors.index.json"
    named: dict[str, str] | None = None
    if index.is_file():
        try:
            named = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"weight index {index} cannot be read; copy it again") from None
    files = (
        sorted(set(named.values())) if named is not None else [p.name for p in folder.glob("*.safetensors")]
    )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent or not files:
        what = f"lacks {absent[0]}, which its index names" if absent else "has no *.safetensors files"
        raise ValueError(f"model folder {folder} {what}; copy the folder again")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(files):
        tensors |= read_head(folder / name)
    missing = [name for name in named or () if name not in tensors]
    if missing:
        raise ValueError(
            f"model folder {folder} lacks the tensor {missing[0]}, which {index.name} places in "
            f"{(named or {})[missing[0]]} ({len(missing)} such); copy the folder again"
        )
    return tensors


class ModelFolder:
    """A model folder as the source of a run: what a learner has to stream, and what it may leave out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.tensors = read_folder(self.path)

    @functools.cached_property
    def config(self) -> Any:
        """The folder's config, read by transformers."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path)

    @functools.cached_property
    def ignored(self) -> frozenset[str]:
        """Tensors that transformers does not load, such as the layers for multi-token
        prediction of DeepSeek-V3.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        patterns: Iterable[str] = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
        return frozenset(n for n in self.tensors if any(re.search(p, n) for p in patterns))

    @functools.cached_property
    def head_and_embedding(self) -> tuple[str, str] | None:
        """The names of the LM head and the embedding, when the folder holds both."""
        head = next((n for n in self.tensors if n.split(".")[-2:] == ["lm_head", "weight"]), None)
        embedding = next((n for n in self.tensors if n.split(".")[-2:] == ["embed_tokens", "weight"]), None)
        return (head, embedding) if head is not None and embedding is not None else None

    @functools.cached_property
    def tied(self) -> bool:
        """Whether head and embedding are one tensor. The files decide: a config may say tied beside a head
        of its own.

        transformers decides alike: it ties what the config says, unless the folder holds two
        tensors that differ.
        """
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return False
        if self.head_and_embedding is None:
            return True
        head, embedding = (self.read(name) for name in self.head_and_embedding)
        return head.shape == embedding.shape and bool(torch.equal(head, embedding))

    @property
    def has_untold_head(self) -> bool:
        """Whether the config says tied and the files say otherwise: whoever reads the config must be told."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False)) and not self.tied

    @property
    def twin(self) -> tuple[str, str] | None:
        """(head, embedding) when the folder holds one tied tensor twice: the stream brings
        the embedding only.
        """
        return self.head_and_embedding if self.tied else None

    @functools.cached_property
    def streamed(self) -> frozenset[str]:
        """The tensors that a learner has to bring."""
        return (
            frozenset(self.tensors) - self.ignored - (frozenset(self.twin[:1]) if self.twin else frozenset())
        )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in host memory."""
        with safe_open(self.path / self.tensors[name].file, "pt") as f:
            return f.get_tensor(name)

    def check_shapes(self, arriving: Mapping[str, tuple[int, ...]], who: str) -> None:
        """WeightSyncError for the first tensor that the folder does not have, or has in another shape."""
        for name, shape in arriving.items():
            if name not in self.tensors:
                raise WeightSyncError(
                    f"{who} cannot place {name} {list(shape)}: {self.path} has no tensor of that name (but "
                    f"{_nearest(name, self.tensors)}); use another learner.backend for this model"
                )
            if tuple(shape) != self.tensors[name].shape:
                raise WeightSyncError(
                    f"{who} cannot place {name}: it comes as {list(shape)} and is "
                    f"{list(self.tensors[name].shape)} in {self.path}"
                )

    def check_whole(self, arrived: Iterable[str], who: str) -> None:
        """Raises WeightSyncError when a tensor that the learner has to bring did not arrive."""
        missing = sorted(self.streamed.difference(arrived))
        if missing:
            raise WeightSyncError(
                f"{who} got no {missing[0]} ({len(missing)} of {len(self.streamed)} tensors of {self.path} "
                "are missing): it would go on with the old ones; use another learner.backend for this model"
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    """A known name that looks like `name`, for a message."""
    import difflib

    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return found[0] if found else "none"
