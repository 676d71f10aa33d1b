"""Makes a built-in model once and finds it again, also when several processes ask at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.pretrained import PRETRAINED, find_pretrained
from gspo_dist.coldstart.recipes import Recipe, recipe_named
from gspo_dist.coldstart.warm_start import train
from gspo_dist.config import ModelConfig

Log = Callable[[str], object]
DONE = "recipe.json"
"""Written last, so that a folder that has it is whole."""
THREADS = 1
"""Threads of the warm start. A second one gains little at this size and loses much on a busy host."""


def ensure_model(config: ModelConfig, log: Log = print, *, seed: int = 0) -> Path:
    """The folder of the model that `config` asks for: its `path`, or its `recipe`, made on first use.

    It is absolute, because the processes of a run work in other folders.

    A made model lies in cache_dir under its recipe's name and fingerprint, so that a changed recipe makes a
    new one. Processes that ask together wait for the one that makes it. It may be called again at any time.
    A recipe of a pretrained model is only found here; ValueError says how to make it.
    """
    if config.path is not None:
        return Path(config.path).expanduser().absolute()
    if config.recipe in PRETRAINED:
        return find_pretrained(PRETRAINED[config.recipe], config.cache_dir)
    recipe = recipe_named(config.recipe)
    cache = Path(config.cache_dir).expanduser().absolute()
    folder = cache / f"{recipe.name}-{recipe.fingerprint(seed)}"
    if (folder / DONE).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(
        cache / f".{folder.name}.lock", lambda: log(f"waiting for another process to make {folder}")
    ):
        if not (folder / DONE).is_file():
            make_model(recipe, folder, seed=seed, log=log)
    return folder


def make_model(recipe: Recipe, folder: Path, *, seed: int, log: Log) -> Path:
    """Makes a recipe's model beside `folder` and moves it there when it is whole.

    Raises ValueError when the folder exists and holds anything else than an unfinished attempt.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"the model's folder must be new or empty: {folder} is not; remove it or name another"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = build_model(recipe.shape, seed)
    size = sum(p.numel() for p in model.parameters())
    log(f"making model {recipe.name!r} ({size / 1e6:.2f}M parameters) in {folder}")
    if recipe.warm_start is not None:
        with _threads(THREADS):
            train(model, recipe.warm_start, seed, log)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        save_model(model, made)
        facts = {
            "recipe": asdict(recipe),
            "seed": seed,
            "fingerprint": recipe.fingerprint(seed),
            "parameters": size,
        }
        (made / DONE).write_text(json.dumps(facts, indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    log(f"model {recipe.name!r} made in {time.monotonic() - started:.0f} s")
    return folder


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """A fixed number of threads: sums are cut up by thread, so another number gives other last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _only_one(lock: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system lets go of it when the process ends, however it ends."""
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
