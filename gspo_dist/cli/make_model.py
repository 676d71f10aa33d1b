"""`gspo make-model`: a built-in cold-start model, made and kept."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence

from gspo_dist.cli.exits import guarded
from gspo_dist.config import ModelConfig


def main(args: Sequence[str]) -> None:
    """Makes the model, or finds it where it was made before, and prints its folder."""
    parser = argparse.ArgumentParser("gspo make-model", description="Makes and keeps a cold-start model.")
    parser.add_argument(
        "--recipe",
        default=ModelConfig.recipe,
        help="quickstart (default) or peer (random weights, for tests of speed)",
    )
    parser.add_argument("--to", help="also copy the folder here")
    parser.add_argument("--cache-dir", default=ModelConfig.cache_dir, help="where made models are kept")
    options = parser.parse_args(args)
    guarded(lambda: _make(options.recipe, options.cache_dir, options.to))


def _make(recipe: str, cache_dir: str, target: str | None) -> None:
    from gspo_dist.coldstart.make import ensure_model

    folder = ensure_model(ModelConfig(recipe=recipe, cache_dir=cache_dir))
    if target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    print(target or folder)
