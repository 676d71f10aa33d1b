"""Whether vLLM's CPU build computes what model families compute, before and after two weight syncs.

    python benchmarks/family_sync.py qwen3_moe mixtral      # one JSON object per family and line

A miniature of the family is started in a real engine, its weights are changed and published twice, and the
engine's log-probs are compared with those of transformers' own forward each time, as a run does it for a
family that no table has (gspo_dist/trainer/setup/engine_check.py). A family at which vLLM ends
the process ends those after it too, so `model_families.py --measured` starts a process for each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from model_families import config_of

from gspo_dist.rollout.vllm.engine import prepare_process
from gspo_dist.trainer.setup.engine_check import measure, told


def attempt(family: str) -> dict[str, object]:
    """What `measure` returns, or {"error": why}. The engine that it starts is the only one of its process."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"family": family, **measure(config_of(family), Path(folder))}
        except Exception as error:  # vLLM's own code; the reason goes into the table
            return {"family": family, "error": told(error, Path(folder))}


def preload() -> None:
    """Imports vLLM, so that processes forked from this one need not."""
    prepare_process("cpu", 1, "fp32")
    importlib.import_module("vllm.entrypoints.llm")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("families", nargs="+", help="model_type of transformers")
    for family in parser.parse_args().families:
        print(json.dumps(attempt(family)), flush=True)
    os._exit(0)  # vLLM's threads may outlive its engines


if __name__ == "__main__":
    main()
