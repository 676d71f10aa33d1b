"""The learners on one model and one batch: tokens per second, peak memory per rank, unused token budget.

    python benchmarks/bench_learner.py                        # every layout, on the quickstart's model
    python benchmarks/bench_learner.py --only eager megatron --model FOLDER
    python benchmarks/bench_learner.py --layers 4 --gpu H100  # GPUs: layers of Qwen3-30B-A3B, with MFU

Every learner gets the same sequences (lengths with a long tail, fixed seed) through the same packer.
`update` is forward, backward and optimiser step of one mini-batch. `old log-probs` is the pass without
gradients. Ranks are Ray actors, as in a run. Packing pads nothing: the unused share is what the
micro-batches leave of `learner.token_budget`. MFU counts three times the forward FLOPs (no recomputation)
against the GPU's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from gspo_dist.cli.compose import run_config
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import ModelConfig, RunConfig
from gspo_dist.learners.loss import LossSpec
from gspo_dist.models.shape import shape_from_config
from gspo_dist.objectives.objective import get_objective
from gspo_dist.packing import MiniBatch, pack
from gspo_dist.planner import Gpu, find_gpu
from gspo_dist.trainer.setup.checks import resolve_device
from gspo_dist.trainer.setup.processes import Processes
from gspo_dist.trainer.step_metrics import packing_metrics
from gspo_dist.types import Completion, Prompt, Rollout

CPU_LAYOUTS = {
    "eager": ["learner=eager", "learner.world_size=1"],
    "deepspeed ZeRO-2": ["learner=deepspeed", "learner.world_size=1"],
    "megatron": ["learner=megatron", "learner.world_size=1"],
    "deepspeed ZeRO-2, 2 ranks": ["learner=deepspeed", "learner.world_size=2"],
    "deepspeed ZeRO-2, AutoEP 2": [
        "learner=deepspeed",
        "learner.world_size=2",
        "learner.deepspeed.expert_parallel=2",
    ],
    "deepspeed ZeRO-3, AutoEP 2": [
        "learner=deepspeed",
        "learner.world_size=2",
        "learner.deepspeed.expert_parallel=2",
        "learner.deepspeed.zero_stage=3",
    ],
    "megatron dp2": ["learner=megatron", "learner.world_size=2"],
    "megatron ep2": ["learner=megatron", "learner.world_size=2", "learner.megatron.expert_parallel=2"],
    "megatron tp2": ["learner=megatron", "learner.world_size=2", "learner.megatron.tensor_parallel=2"],
    "megatron pp2": ["learner=megatron", "learner.world_size=2", "learner.megatron.pipeline_parallel=2"],
    "megatron cp2": ["learner=megatron", "learner.world_size=2", "learner.megatron.context_parallel=2"],
}
GPU_LAYOUTS = {name: CPU_LAYOUTS[name] for name in ("eager", "deepspeed ZeRO-2", "megatron")}


def sequences(count: int, mean: int, longest: int, vocabulary: int) -> list[Rollout]:
    """Rollouts of log-normal lengths (long tail), ids drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        n = int(np.clip(rng.lognormal(np.log(mean), 0.6), 4, longest - 8))
        out.append(
            Rollout(
                i,
                i // 8,
                Prompt("p", tuple(rng.integers(3, vocabulary, 8).tolist()), ""),
                Completion(
                    rng.integers(3, vocabulary, n),
                    np.ones(n, bool),
                    np.full(n, -1.0, np.float32),
                    np.zeros(n, np.int32),
                    "stop",
                    "",
                ),
                float(i % 2),
            )
        )
    return out


def real_shapes(folder: Path, layers: int) -> str:
    """A random model with Qwen3-30B-A3B's shapes and `layers` layers; returns its folder."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from gspo_dist.coldstart.tokenizer import build_tokenizer

    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            decoder_sparse_step=1,
        )
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def batches(config: RunConfig, rollouts: list[Rollout]) -> MiniBatch:
    """All rollouts as one mini-batch, packed for the layout's replicas."""
    rewards = [1.0 if r.reward else -1.0 for r in rollouts]
    return pack(
        rollouts,
        rewards,
        replicas=config.learner.data_parallel,
        token_budget=config.learner.token_budget,
        mini_batches=1,
        max_completion_length=config.rollout.max_completion_tokens,
        seed=(0,),
    )[0]


def measure(config: RunConfig, model: str, rollouts: list[Rollout], repeats: int) -> dict[str, float]:
    """Medians of one layout, after two rounds that warm up."""
    mini = batches(config, rollouts)
    spec = LossSpec(get_objective("gspo"), mini.denominators)
    with (
        tempfile.TemporaryDirectory() as folder,
        Processes(config, model, resolve_device(config.cluster), Path(folder), 0, engines=False) as processes,
    ):
        group = processes.learner()
        group.start()
        update, passes = [], []
        for i in range(repeats + 2):
            start = time.perf_counter()
            group.logprobs(mini.micro_batches)
            middle = time.perf_counter()
            group.forward_backward(mini, spec)
            group.optim_step()
            if i >= 2:
                passes.append(middle - start)
                update.append(time.perf_counter() - middle)
        memory = group.peak_memory()
    return {
        "update_tokens_per_s": mini.num_tokens / statistics.median(update),
        "logprobs_tokens_per_s": mini.num_tokens / statistics.median(passes),
        "peak_bytes_per_rank": max(m.get("gpu", m["host"]) for m in memory.values()),
        "padding": 1.0 - packing_metrics([mini], config.learner.token_budget)["packing/efficiency"],
        "tokens": mini.num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--sequences", type=int, default=128, help="rollouts in the batch")
    parser.add_argument("--mean", type=int, default=48, help="mean completion length")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--layers", type=int, default=0, help="this many layers at Qwen3-30B-A3B's shapes instead (GPU)"
    )
    parser.add_argument("--model", help="an HF folder instead of the quickstart's model")
    parser.add_argument("--gpu", help="GPU kind for MFU, e.g. H100")
    parser.add_argument("--only", nargs="+", help="names of layouts")
    parser.add_argument("--json", type=Path, help="also write every number here")
    options = parser.parse_args()
    layouts = GPU_LAYOUTS if options.layers else CPU_LAYOUTS
    unknown = set(options.only or layouts) - set(layouts)
    if unknown:
        parser.error(
            f"--only must name layouts of {', '.join(map(repr, layouts))}: got {', '.join(sorted(unknown))}"
        )
    try:
        gpu = find_gpu(options.gpu) if options.gpu else None
    except ValueError as error:
        parser.error(f"--gpu: {error}")
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            model = real_shapes(Path(folder), options.layers)
        else:
            model = options.model or str(ensure_model(ModelConfig()))
        longest = 8192 if options.layers else 256
        mean = 2048 if options.layers else options.mean
        vocabulary = json.loads(Path(model, "config.json").read_text())["vocab_size"]
        rollouts = sequences(options.sequences, mean, longest, vocabulary)
        results = {}
        print(
            "| learner | update tokens/s | old log-probs tokens/s | peak memory per rank (MiB) "
            "| unused budget |" + (" MFU |" if gpu else "")
        )
        print("|---|---|---|---|---|" + ("---|" if gpu else ""))
        for name, overrides in layouts.items():
            if options.only and name not in options.only:
                continue
            budget = 16384 if options.layers else 2048
            config = run_config(
                [
                    *overrides,
                    f"learner.precision={'bf16' if options.layers else options.precision}",
                    f"learner.token_budget={budget}",
                    "rollout.prompts_per_step=16",
                    "rollout.group_size=8",
                    "rollout.max_prompt_tokens=8",
                    f"rollout.max_completion_tokens={longest - 8}",
                    "rollout.engines=1",
                ]
            )
            row = measure(config, model, rollouts, options.repeats)
            results[name] = row
            line = (
                f"| {name} | {row['update_tokens_per_s']:,.0f} | {row['logprobs_tokens_per_s']:,.0f} | "
                f"{row['peak_bytes_per_rank'] / 2**20:,.0f} | {row['padding']:.1%} |"
            )
            if gpu:
                line += f" {mfu(model, row, rollouts, gpu, config.learner.world_size):.1%} |"
            print(line, flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def mfu(model: str, row: dict[str, float], rollouts: list[Rollout], gpu: Gpu, ranks: int) -> float:
    """Model FLOPs utilisation of the update: 3 x the forward's FLOPs over the dense peak.

    The backward pass counts as two forward ones.
    """
    lengths = np.array([len(r.prompt.token_ids) + len(r.completion.token_ids) for r in rollouts])
    shape = shape_from_config(json.loads(Path(model, "config.json").read_text()), "bench")
    # Attention's share of a token grows with its sequence: the mean over tokens, not over sequences.
    flops = 3 * shape.forward_flops(row["update_tokens_per_s"], float((lengths**2).sum() / lengths.sum()))
    return flops / (gpu.tflops * 1e12 * ranks)


if __name__ == "__main__":
    main()
