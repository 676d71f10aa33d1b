"""A model folder as Hugging Face writes it: what must be in it, and its tensors by name.

Every learner reads models through this file, so that one rule says what a folder must hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gspo_dist.models.shape import read_shape

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


class WeightFiles:
    """The tensors of a folder's safetensors files by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError, naming the file, for an index without its files and for a torn file."""
        self.folder = folder
        self.files: dict[str, str] = {}
        """Tensor -> the file that holds it."""
        index = folder / INDEX
        named = _read_index(index) if index.is_file() else {}
        names = sorted(set(named.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"model.path lacks weight files named by its index: {missing[:4]}; copy the folder again"
            )
        for name in names:
            # Headers only. The index is not trusted for what a file holds: it may be of another save.
            with self._open(name) as file:
                self.files |= dict.fromkeys(file.keys(), name)
        lost = sorted(named.keys() - self.files.keys())
        if lost:
            raise ValueError(
                f"model.path lacks the weights {lost[:3]}, which {index} places in {named[lost[0]]}; copy "
                "the folder again"
            )

    def _open(self, name: str) -> AbstractContextManager[Any]:
        path = self.folder / name
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(_torn(path, error)) from error

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole tensor, on the host. Raises KeyError for a name that is not there."""
        with self._open(self.files[name]) as file:
            return file.get_tensor(name)

    def ending_in(self, suffix: str) -> list[str]:
        """The names with this last part, in order."""
        return sorted(name for name in self.files if name == suffix or name.endswith(f".{suffix}"))


def _read_index(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.path's index {index} cannot be read ({error}); copy the folder again"
        ) from error


def _torn(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be opened, and the way out."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` in {path.parent}"
    return f"{path} is torn or is no safetensors file ({error}; {path.stat().st_size:,} bytes): copy it again"


def check_model_folder(path: str | Path) -> Path:
    """The folder of an HF model. Raises ValueError for one that cannot be, before anything heavy starts.

    It reads the headers of all weight files, and the head where it may contradict the config.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model.path must be a folder with an HF model: {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path must hold config.json: {folder} has {sorted(p.name for p in folder.iterdir())[:8]}"
        )
    if not (folder / INDEX).is_file() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.path must hold *.safetensors weights: none in {folder}")
    weights = WeightFiles(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"model.path must hold a tokenizer (tokenizer.json): none in {folder}")
    _check_head(folder, weights)
    return folder


def _check_head(folder: Path, weights: WeightFiles) -> None:
    """Refuses a head of its own in the files of a model whose config says that it has none.

    The libraries disagree on such a folder: transformers trains the head apart, while vLLM uses the embedding
    in its place, so that the engines would sample from another model than the learner trains.
    """
    heads, embeddings = weights.ending_in(HEAD), weights.ending_in(EMBEDDING)
    if not heads or len(embeddings) != 1 or not read_shape(folder).tied:
        return
    if not torch.equal(weights[heads[0]], weights[embeddings[0]]):
        raise ValueError(
            f"{folder / 'config.json'} says tie_word_embeddings, but {weights.files[heads[0]]} holds a "
            f"{heads[0]} that differs from {embeddings[0]}: set tie_word_embeddings to false there to train "
            "that head, or remove the tensor to train the embedding in its place"
        )


def check_loaded(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError unless the folder's weights and the model's parameters are the same set.

    missing: parameters that no file holds, which a loader would fill at random.
    unexpected: tensors that the model has no place for, except what its class says it ignores.
    """
    lacks, extra = sorted(missing), sorted(name for name in unexpected if not _recomputed(name))
    if lacks:
        raise ValueError(
            f"model.path lacks the weights {lacks[:3]}{_more(lacks)}: {folder} does not hold the model that "
            "its config.json describes; copy the folder again, or correct config.json"
        )
    if extra:
        raise ValueError(
            f"model.path holds the weights {extra[:3]}{_more(extra)}, which the model of "
            f"{folder}/config.json has no place for; correct config.json, or remove them from the files"
        )


def _recomputed(name: str) -> bool:
    """Tables that old checkpoints carry and every model computes for itself."""
    return name.endswith(("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias"))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
