"""What one card really takes to sample from Qwen3-30B-A3B, beside what `gspo plan` says.

    python benchmarks/gpu_rates.py --out benchmarks/reports/gpu/rates.md     # a GPU with 80 GB, 4 minutes

One vLLM engine holds all layers in bf16 (61 GB) with random weights, whose routers choose experts about
evenly, as the plan assumes. A decode step is the difference between two lengths of completions over the
tokens between them, so that neither prefill nor the engine's start is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_dist.config import RolloutConfig
from gspo_dist.models.config_file import find_config
from gspo_dist.models.shape import ModelShape, read_shape
from gspo_dist.planner.calibration import ASSUMPTIONS
from gspo_dist.planner.decode import decode_step_s, prefill_token_s
from gspo_dist.planner.hardware import Gpu, find_gpu
from gspo_dist.planner.layout import EngineLayout

SHORT, LONG = 32, 160
"""Tokens of the two completions whose difference is timed."""
PROMPT, READ = 64, 1024
"""Tokens of the prompts of decoding, and of those whose reading is timed."""
ENGINE = EngineLayout(RolloutConfig(engine="vllm", precision="bf16"))


def write_folder(name: str, layers: int | None, folder: Path) -> Path:
    """A model folder with a config and a tokeniser, and no weights."""
    from gspo_dist.coldstart.tokenizer import build_tokenizer

    config, _ = find_config(name)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)
    layers = layers or config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return folder


def decode_row(model: ModelShape, gpu: Gpu, sequences: int, seconds: float) -> str:
    """A row of the report: a measured decode step beside the planned one."""
    planned = decode_step_s(model, ENGINE, gpu, sequences, PROMPT + (SHORT + LONG) / 2, ASSUMPTIONS)
    return (
        f"| a decode step of {sequences} | {1e3 * seconds:.2f} ms | {1e3 * planned:.2f} ms | "
        f"{seconds / planned:.2f} | {sequences / seconds:,.0f} |"
    )


def prefill_row(model: ModelShape, gpu: Gpu, prompts: int, seconds: float) -> str:
    """A row of the report: measured seconds to read one token beside the planned ones."""
    planned = prefill_token_s(model, ENGINE, gpu, READ / 2, ASSUMPTIONS)
    return (
        f"| a token of {prompts} prompts of {READ} | {1e6 * seconds:.2f} us | {1e6 * planned:.2f} us | "
        f"{seconds / planned:.2f} | {1 / seconds:,.0f} |"
    )


def measure(llm: Any, model: ModelShape, gpu: Gpu, counts: list[int], prefill: int) -> list[str]:
    """The rows of the report, printed as they come."""
    import numpy as np
    import torch
    from vllm import SamplingParams

    rng = np.random.default_rng(0)

    def seconds(prompts: int, tokens: int, length: int) -> float:
        spec = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        asked = [{"prompt_token_ids": rng.integers(3, model.vocab, length).tolist()} for _ in range(prompts)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        llm.generate(asked, spec, use_tqdm=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    rows = []
    for count in counts:
        seconds(count, SHORT, PROMPT)
        long, short = (min(seconds(count, tokens, PROMPT) for _ in range(2)) for tokens in (LONG, SHORT))
        rows.append(decode_row(model, gpu, count, (long - short) / (LONG - SHORT)))
        print(rows[-1], flush=True)
    prompts = max(1, prefill // READ)
    seconds(prompts, 1, READ)
    took = min(seconds(prompts, 1, READ) for _ in range(3))
    rows.append(prefill_row(model, gpu, prompts, took / (prompts * READ)))
    print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="a name that `gspo plan` knows")
    parser.add_argument("--layers", type=int, help="fewer layers, for a card with less memory")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--prefill", type=int, default=8192, help="tokens that are read at once")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_rates"))
    parser.add_argument("--out", type=Path, help="the report (default: report.md in the work folder)")
    args = parser.parse_args()
    # Not the engine's `prepare_process`: vLLM's own model runner is what published rows ran.
    for name, value in (
        ("LOGGING_LEVEL", "ERROR"),
        ("NO_USAGE_STATS", "1"),
        ("ENABLE_V1_MULTIPROCESSING", "0"),
    ):
        os.environ.setdefault(f"VLLM_{name}", value)

    import torch
    from vllm import LLM

    folder = write_folder(args.model, args.layers, args.work / "model")
    card = torch.cuda.get_device_name(0)
    model, gpu = read_shape(folder), find_gpu(card)
    llm = LLM(
        model=str(folder), load_format="dummy", dtype="bfloat16", max_num_seqs=max(args.sequences),
        max_model_len=2 * READ, gpu_memory_utilization=0.92, enable_prefix_caching=False,
        max_num_batched_tokens=args.prefill, disable_log_stats=True,
    )  # fmt: skip
    rows = measure(llm, model, gpu, args.sequences, args.prefill)
    out = args.out or args.work / "report.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    head = [
        f"# {args.model} on one {card}",
        "",
        f"`{' '.join(['python benchmarks/gpu_rates.py', *sys.argv[1:]])}`, {model.layers} layers, bf16",
        "",
        "| work | measured | planned | measured / planned | tokens/s |",
        "|---|---|---|---|---|",
    ]
    out.write_text("\n".join([*head, *rows, ""]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
