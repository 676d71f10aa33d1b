"""`learner.consistency=exact` by model family: which tokens have the engine's log-prob, and what is refused.

    python benchmarks/exact_families.py                     # all families, some minutes
    python benchmarks/exact_families.py mixtral olmoe       # some
    python benchmarks/exact_families.py --out benchmarks/reports/exactness_families.md

A miniature of each family, with random weights, norms and biases, is measured as bench_exact.py measures its
models, once in float32 and once in bf16, in processes of their own. The folders are in the run's precision.
The exit status is 1 where a token of `exact` differs from the engine's, or a gradient in float32 from the one
of `off` by more than 1e-5.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bench_exact import measure, processor, wrong
from model_families import DENSE, MOE, apart, make_miniature
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.config.consistency import REFUSED_FAMILIES
from gspo_dist.learners.exact.families import FAMILIES
from gspo_dist.rollout.vllm.engine import prepare_process

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def known() -> list[str]:
    """`model_type` of every family that exact mode takes, mixtures first."""
    return [f for f in (*MOE, *DENSE) if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(f) in FAMILIES]


def prepare(family: str, precision: str, folder: Path) -> None:
    model = make_miniature(family)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dim() == 1 and "inv_freq" not in name:
            torch.nn.init.normal_(tensor, 1.0 if "norm" in name else 0.0, 0.1)
    model.to(PRECISIONS[precision]).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def attempt(family: str, precision: str) -> dict[str, Any]:
    """What bench_exact.py measures of a family, or {"error": why}."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / family
        try:
            prepare(family, precision, folder)
            return measure(folder, precision, threads=1, repeats=0)
        except Exception as error:  # transformers' or vLLM's code; the reason goes into the table
            return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def report(cases: list[tuple[str, str, dict[str, Any]]], command: str) -> str:
    lines = [
        "# One number on both sides, by model family",
        "",
        f"`{command}` on {processor()}, torch {torch.__version__}.",
        "Each is a miniature with random weights, norms and biases, in a folder of the run's precision.",
        "The columns are those of [the page on sizes and threads](exactness.md).",
        "",
        "| family | precision | tokens | prefill | off | off: mean | off: max | exact, packed | "
        "exact, alone | gradient |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, precision, case in cases:
        if "error" in case:
            lines.append(f"| {family} | {precision} | {case['error']} | | | | | | | |")
            continue
        off, exact = case["learners"]["off"], case["learners"]["exact"]
        lines.append(
            f"| {family} | {precision} | {case['tokens']} | {case['prefill']} | {off['packed']} | "
            f"{off['mean']:.1e} | {off['max']:.1e} | {exact['packed']} | {exact['alone']} | "
            f"{case['gradient']:.1e} |"
        )
    lines += [
        "",
        "Refused by the name of what was not made equal (`gspo legality`):",
        "",
        *(f"- {name}: {reason}" for name, reason in REFUSED_FAMILIES.items()),
        "",
        "Every other architecture is refused by its name.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=known(), metavar="FAMILY", help=", ".join(known()))
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS))
    parser.add_argument("--keep", type=Path, help="JSON of what was measured: an interrupted run goes on")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    prepare_process("cpu", 1, "fp32")
    importlib.import_module("vllm.entrypoints.llm")  # once, for the processes that are forked from this one
    kept: dict[str, Any] = json.loads(args.keep.read_text()) if args.keep and args.keep.is_file() else {}
    cases, bad = [], []
    for family in args.families:
        for precision in args.precision:
            key = f"{family} {precision}"
            case = kept[key] if key in kept else apart(attempt, family, precision)
            kept[key] = case
            if args.keep:
                args.keep.write_text(json.dumps(kept, indent=1))
            cases.append((family, precision, case))
            found = [case["error"]] if "error" in case else wrong(precision, case)
            bad += [f"{key}: {x}" for x in found]
            print(f"{key}: {found or 'equal'}", flush=True)
    asked = args.families if args.families != known() else []
    text = report(cases, " ".join(["python benchmarks/exact_families.py", *asked]))
    print(text)
    if args.out:
        args.out.write_text(text)
    for line in bad:
        print(f"WRONG: {line}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
