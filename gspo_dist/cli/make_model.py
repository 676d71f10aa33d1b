"""`gspo make-model`: a model to start from, made and kept."""

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
        help="quickstart (default); calculator, python or guess (taught turns), rethink (long solutions), "
        "peer (random weights, for tests of speed), or smollm (a pretrained model from the package index, "
        "made a mixture of experts)",
    )
    parser.add_argument("--to", help="also copy the folder here")
    parser.add_argument("--cache-dir", default=ModelConfig.cache_dir, help="where made models are kept")
    options = parser.parse_args(args)
    guarded(lambda: _make(options.recipe, options.cache_dir, options.to))


def _make(recipe: str, cache_dir: str, target: str | None) -> None:
    from gspo_dist.coldstart.make import ensure_model
    from gspo_dist.coldstart.pretrained import PRETRAINED, make_pretrained

    if recipe in PRETRAINED:
        folder = make_pretrained(PRETRAINED[recipe], cache_dir)
    else:
        folder = ensure_model(ModelConfig(recipe=recipe, cache_dir=cache_dir))
    if target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    print(target or folder)
