"""What the self-check of a run costs before the run starts, once per model, and the one of its engine.

    python benchmarks/self_check_cost.py      # one JSON object, learner -> seconds

The model has the config and the names of Qwen3-30B-A3B: 18,867 tensors in a file of 61 GB, a hole behind
its head, since the check reads no weight. Each learner is asked as a run asks it, in processes of its own
where the run would start one. Imports count, as far as nothing before has made them.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import get_args

from transformers import AutoConfig

from gspo_dist.learners import own_process
from gspo_dist.learners.self_check import Kind, inspect
from gspo_dist.learners.stream_names import of_config
from gspo_dist.trainer.setup import engine_check

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}


def write_hollow(folder: Path) -> None:
    """A model folder with the whole model's config and names, and nothing where its weights would be."""
    config = AutoConfig.for_model("qwen3_moe", **QWEN3_30B_A3B)
    (folder / "config.json").write_text(config.to_json_string())
    head, end = {}, 0
    for name, shape in of_config(config).items():
        start, end = end, end + 2 * math.prod(shape)
        head[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def costs() -> dict[str, dict[str, float]]:
    """Learner, or `engine` -> seconds of CPU and elapsed, for a check that passes."""
    found = {}
    with tempfile.TemporaryDirectory() as parent:
        write_hollow(Path(parent))
        for kind in get_args(Kind):
            cpu, started = cpu_seconds(), time.perf_counter()
            result = inspect(parent, kind=kind)
            assert len(result.findings) == 4, "the learner's process came to no result"
            assert not result.failed("alone", "packed", "names", "routes"), result
            found[kind] = {"cpu": cpu_seconds() - cpu, "elapsed": time.perf_counter() - started}
    cpu, started = cpu_seconds(), time.perf_counter()
    config = AutoConfig.for_model("qwen3_moe", **QWEN3_30B_A3B).to_dict()
    [finding] = own_process.ask(engine_check.__name__, config, "bf16")
    assert finding.passed, finding
    found["engine"] = {"cpu": cpu_seconds() - cpu, "elapsed": time.perf_counter() - started}
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(json.dumps(costs()))
