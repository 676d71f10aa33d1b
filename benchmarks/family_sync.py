"""Whether vLLM's CPU build computes what model families compute, before and after two weight syncs.

    python benchmarks/family_sync.py qwen3_moe mixtral      # one JSON object per family and line

A miniature of the family is started in a real engine, its weights are changed and published twice, and the
engine's log-probs are compared with those of transformers' own forward each time. A family at which vLLM ends
the process ends those after it too, so `model_families.py --measured` starts a process for each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))

from model_families import make_miniature

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.vllm.engine import VllmEngine, prepare_process
from gspo_dist.weights.names import hf_named_weights, stored_tensors
from gspo_dist.weights.send import make_transport, send_weights
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.verify import verify_receipt

LENGTHS = (7, 70)
"""Tokens of the two sequences: within a cache block, and over several."""
BUCKET_BYTES = 1 << 18
"""Small, so that layers are cut into several buckets."""


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word per token id; the engine wants a tokenizer and never uses it here."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(folder)


@torch.no_grad()
def reference(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """[len - 1] log-probs of every token after the first by transformers' own forward."""
    tokens = torch.from_numpy(ids)
    table = model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    return table[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


@torch.no_grad()
def change(model: PreTrainedModel, seed: int) -> None:
    """Moves every tensor that the folder holds, a tenth of its own spread or of 0.1."""
    g = torch.Generator().manual_seed(seed)
    for _, tensor in stored_tensors(model):
        if tensor.is_floating_point():
            scale = 0.1 * float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.add_(max(scale, 0.01) * torch.randn(tensor.shape, generator=g))


def largest(engine: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest |difference| in nats."""
    return max(float(np.abs(a - b).max()) for a, b in zip(engine, expected, strict=True))


def measure(family: str, folder: Path) -> dict[str, float]:
    """start: the difference before any sync; synced: the largest after two; moved: what they changed."""
    made = make_miniature(family)
    made.save_pretrained(folder)
    vocabulary = int(made.config.get_text_config().vocab_size)
    write_tokenizer(folder, vocabulary)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = RolloutConfig(
        precision="fp32",
        max_prompt_tokens=96,
        max_completion_tokens=32,
        enforce_eager=True,
        kv_cache_gib=0.1,
    )
    engine = VllmEngine(config, folder, threads=1)
    try:
        return synced(engine, model, vocabulary)
    finally:
        engine.close()


def synced(engine: VllmEngine, model: PreTrainedModel, vocabulary: int) -> dict[str, float]:
    """What `measure` returns, of a started engine."""
    random = np.random.default_rng(0)
    ids = [random.integers(2, vocabulary, n) for n in LENGTHS]
    last = engine.logprobs_of(ids)
    found = {"start": largest(last, [reference(model, i) for i in ids]), "synced": 0.0, "moved": 1e9}
    transport = make_transport("shm")
    engine.init_weight_sync(transport.init_info(0))
    for version in (1, 2):
        change(model, version)
        engine.start_weight_update()
        sent = send_weights(buckets(hf_named_weights(model), BUCKET_BYTES), transport, engine.update_weights)
        verify_receipt(sent.checksums, engine.finish_weight_update(version), version)
        now = engine.logprobs_of(ids)
        found["synced"] = max(found["synced"], largest(now, [reference(model, i) for i in ids]))
        found["moved"] = min(found["moved"], largest(now, last))
        last = now
    transport.close()
    return found


def attempt(family: str) -> dict[str, object]:
    """What `measure` returns, or {"error": why}. The engine that it starts is the only one of its process."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"family": family, **measure(family, Path(folder))}
        except Exception as error:  # vLLM's own code; the reason goes into the table
            said = " ".join(line.strip() for line in str(error).splitlines()[:2]).replace(folder, "FOLDER")
            return {"family": family, "error": f"{type(error).__name__}: {said[:300]}"}


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
