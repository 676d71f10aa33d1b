"""Whether the DeepSpeed learner under ZeRO 3 computes what model families compute.

    python benchmarks/family_zero3.py qwen3_moe mixtral      # one JSON object per family and line

ZeRO 3 builds and fills a model in a way of its own (gspo_dist/learners/deepspeed/load.py), which the
self-check of a run does not go through. Here a miniature of each family does, on one rank with gloo: its
log-probs are compared with those of transformers' own forward, alone and packed, its stream with its folder
bit for bit, and its routes are recorded and replayed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

from model_families import config_of

from gspo_dist.config import DeepSpeedConfig, LearnerConfig
from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner
from gspo_dist.learners.properties import (
    Ask,
    Finding,
    check_architecture,
    guarded,
    save_miniature,
    streams,
)

PORT = 29533
"""Where the one rank meets itself."""


def findings(family: str) -> list[Finding]:
    """alone, packed, names and, with experts, routes under ZeRO 3."""
    learners: list[DeepSpeedLearner] = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"

        def load(original: PreTrainedModel) -> Ask:
            save_miniature(original, folder)
            config = LearnerConfig(
                backend="deepspeed", world_size=1, precision="fp32", deepspeed=DeepSpeedConfig(zero_stage=3)
            )
            learner = DeepSpeedLearner(config, folder, total_steps=1, master_port=PORT)
            learners.append(learner)
            return lambda batch, record: learner.logprobs([batch], record_routing=record)[0]

        def names() -> tuple[bool, str]:
            weights = (pair for bucket in learners[0].weights(1 << 20) for pair in bucket)
            return streams(folder, weights)

        found = list(check_architecture(config_of(family), load))
        if learners:
            found.insert(2, guarded("names", names))
            learners[0].engine.destroy()
    return found


def main(families: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for family in families:
        print(json.dumps({"family": family, "findings": [asdict(f) for f in findings(family)]}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("families", nargs="+", help="model_type of transformers")
    main(parser.parse_args().families)
