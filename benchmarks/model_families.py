"""Which model families the HF-based learners serve: the self-check over every family, built small.

    python benchmarks/model_families.py                       # every family of the lists, a second each
    python benchmarks/model_families.py qwen3_moe granite     # some
    python benchmarks/model_families.py --out report.md       # writes the table there

Each family is built as a miniature with random weights, saved by transformers and checked as a run checks
a model folder (gspo_dist/learners/self_check.py): on a CPU, in float32, without any download. A family that
transformers cannot build from its own defaults gets the sizes of a published model from `PUBLISHED`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gspo_dist.learners.self_check import TOLERANCE, SelfCheck, inspect, small_config, spread
from gspo_dist.models.shape import ModelShape, shape_from_config

MOE = [
    "afmoe",
    "axk1",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "laguna",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
    "zaya",
]
DENSE = [
    "apertus",
    "arcee",
    "bamba",
    "bitnet",
    "cohere",
    "cohere2",
    "cwm",
    "diffllama",
    "ernie4_5",
    "exaone4",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "granite_swa",
    "helium",
    "hunyuan_v1_dense",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "ministral",
    "mistral",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "recurrent_gemma",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
]
PUBLISHED: dict[str, dict[str, Any]] = {
    "cwm": {"bos_token_id": 1, "eos_token_id": 2},
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_routed_experts": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "dots1": {
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 128,
    },
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 6.0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 4, "head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
}
"""Settings of published models where the defaults of the class are incomplete or are nobody's."""


@dataclass(frozen=True)
class Row:
    """What the check says of one family."""

    family: str
    """`model_type`."""
    shape: ModelShape
    """The whole model, by the defaults of its class."""
    found: SelfCheck | None
    """None where transformers does not build it small."""
    reason: str
    """Why not; empty otherwise."""
    seconds: float
    """Wall-clock time of building, saving and checking."""


def check(family: str) -> Row:
    """Builds, saves and checks one family."""
    started = time.perf_counter()
    config = json.loads(AutoConfig.for_model(family, **PUBLISHED.get(family, {})).to_json_string())
    shape = shape_from_config(config)
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(config), dtype=torch.float32)
        spread(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found, reason = inspect(folder), ""
    except Exception as error:  # the family's own code
        found, reason = None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return Row(family, shape, found, reason, time.perf_counter() - started)


def verdict(row: Row) -> str:
    """works | works without routes | refused, with the property that decides."""
    if row.found is None:
        return "not checked"
    failed = [f.property for f in row.found.findings if not f.passed]
    if not failed:
        return "works"
    return "works without routes" if failed == ["routes"] else f"refused: {failed[0]}"


def cell(row: Row, name: str) -> str:
    """yes, or what was measured; a dash where the property does not apply."""
    finding = next((f for f in row.found.findings if f.property == name), None) if row.found else None
    if finding is None:
        return "-"
    if finding.passed:
        return "yes"
    if "up to" in finding.measured:
        return finding.measured.split("up to ")[1].removesuffix(" nats")
    return "no known router" if "known router" in finding.measured else "no"


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| family | layers attend by | alone | packed | names | routes | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        kinds = ", ".join(sorted({k.removesuffix("_attention") for k in row.shape.layer_kinds})) or "-"
        cells = [cell(row, name) for name in ("alone", "packed", "names", "routes")]
        yield f"| {row.family} | {kinds} | {' | '.join(cells)} | {verdict(row)} |"


def report(moe: Sequence[Row], dense: Sequence[Row]) -> str:
    rows = [*moe, *dense]
    works = sum(verdict(r).startswith("works") for r in rows)
    refused = sum(verdict(r).startswith("refused") for r in rows)
    mean = sum(r.found.seconds for r in rows if r.found) / max(1, sum(r.found is not None for r in rows))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    text = f"""\
# Model families

Made by `python benchmarks/model_families.py --out benchmarks/reports/models.md`, with {versions}.

What the eager and the DeepSpeed learner do with each family that transformers builds at toy size. The
Megatron learner serves the families that `gspo_dist/learners/megatron/architecture.py` lists, and vLLM
those that it lists itself. Neither is measured here.

- **alone**: log-probs of one sequence are those of transformers' own forward, within {TOLERANCE} nats
  in float32. It fails for scales after the head, windows, chunks, sinks and caps that the learner does not
  have, and for dropout and router noise of the training mode.
- **packed**: they stay the same behind another sequence. It fails for layers with memory.
- **names**: the learner streams the tensors of the model folder.
- **routes**: experts can be recorded and replayed (routing replay, and the metric of routing flips).

A number is the largest difference in nats; "no" is an error. A run refuses a model with the first
property that fails, unless it does without it (routes) or `model.self_check=false` is set.

{len(rows)} families: {works} work, {refused} are refused, {len(rows) - works - refused} cannot be built
from their defaults. The check takes {mean:.1f} s on average on one core, once per model folder.
"""
    lines = [text, "## Mixtures of experts", "", *table(moe), "", "## Dense models", "", *table(dense)]
    unchecked = [r for r in rows if r.found is None]
    if unchecked:
        lines += ["", "## Not checked", "", *(f"- {r.family}: {r.reason}" for r in unchecked)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="model_type of transformers; none: all of the lists")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    wanted = args.families or [*MOE, *DENSE]
    rows = []
    for family in wanted:
        rows.append(check(family))
        print(f"{family}: {verdict(rows[-1])} {rows[-1].reason} ({rows[-1].seconds:.1f} s)", flush=True)
    moe = [r for r in rows if r.shape.moe_layers or r.family in MOE]
    text = report(moe, [r for r in rows if r not in moe])
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
