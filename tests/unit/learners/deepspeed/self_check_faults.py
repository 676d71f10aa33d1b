"""Runs the self-check of ZeRO 3 with one fault after the other in the learner. Reads a config and the
model's folder.

python self_check_faults.py FOLDER < config.json      (one JSON object, fault -> findings, on the last line)
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gspo_dist.learners.deepspeed import learner, load, self_check
from gspo_dist.learners.deepspeed.config import import_deepspeed
from gspo_dist.learners.deepspeed.export import full_weights


def reversed_rows(target: torch.Tensor, name: str, *rest: Any) -> list[str]:
    """Experts are read in the wrong order."""
    files = COPY(target, name, *rest)
    if name.endswith("experts.down_proj"):
        target.copy_(target.flip(0))
    return files


def swapped_halves(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The experts' gate and up projections leave under each other's name."""
    for name, tensor in full_weights(*args, **kwargs):
        yield name.replace("gate_proj", "@").replace("up_proj", "gate_proj").replace("@", "up_proj"), tensor


def without_a_router(source: Any) -> dict[str, tuple[int, ...]]:
    """What is foretold of the whole model lacks the last layer's router."""
    found = FORETELL(source)
    del found["model.layers.2.mlp.gate.weight"]
    return found


COPY, FORETELL = load.copy_into, self_check.of_family
FAULTS = {
    "none": (learner, "full_weights", full_weights),
    "reversed rows": (load, "copy_into", reversed_rows),
    "swapped halves": (learner, "full_weights", swapped_halves),
    "no router": (self_check, "of_family", without_a_router),
}


def check(name: str, config: dict[str, Any], whole: Path) -> list[dict[str, Any]]:
    with patch.object(*FAULTS[name]):
        return [asdict(found) for found in self_check.check(config, whole)]


def main() -> None:
    config, whole = json.load(sys.stdin), Path(sys.argv[1])
    import_deepspeed("cpu")  # once for all
    seen = {}
    for name in FAULTS:
        # A fork for each: DeepSpeed 0.19.8 keeps the groups of a learner that has left them.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            seen[name] = pool.apply(check, (name, config, whole))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
