"""What a model folder must hold before a learner trains it: one rule for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gspo_dist.weights.folder import read_folder


def check_model_folder(path: str | Path) -> Path:
    """The folder of an HF model. Raises ValueError for one that cannot be, before anything heavy starts.

    It reads the heads of all weight files, so that a torn or missing one is named here.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model.path must be a folder with an HF model: {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path must hold config.json: {folder} has {sorted(p.name for p in folder.iterdir())[:8]}"
        )
    read_folder(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"model.path must hold a tokenizer (tokenizer.json): none in {folder}")
    return folder


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
