"""TRL at the sizes of `bench_step.py --peer`: GSPO with HF generate on the same model, prompts and machine.

    pip install --target SITE --no-deps trl==1.16.0 accelerate datasets dill multiprocess pandas \\
        python-dateutil pytz tzdata
    PYTHONPATH=SITE python benchmarks/baselines/trl_step.py --threads 1 2

TRL is no dependency of gspo_dist: it goes into a folder of its own, beside this environment's torch and
transformers. A step is what both do: sample prompts x completions, judge, one optimiser step, and sample with
the new weights. HF generate has no weights to send. Completion tokens are counted as sampled, up to and with
the end of sequence. The first quarter of the steps warms up and is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZES = ((8, 8, 32), (8, 8, 128), (16, 16, 32), (8, 8, 880))
"""Prompts, completions of each, limit in tokens. The random model ends a completion with probability 1/64 per
token, so a limit of 880 cuts none: it is 20 times the median, and the longest of 64 has about 6 medians."""


def run(prompts: int, group: int, tokens: int, steps: int, threads: int) -> dict[str, float]:
    """Median seconds per step and completion tokens per second, in this process."""
    import torch

    torch.set_num_threads(threads)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from gspo_dist.coldstart.make import ensure_model
    from gspo_dist.config import DataConfig, ModelConfig
    from gspo_dist.data.prompts import load_prompts

    folder = str(ensure_model(ModelConfig(recipe="peer")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = load_prompts(DataConfig(heldout=None), "train", tokenizer, max_prompt_tokens=16, seed=0)
    texts = [tokenizer.decode(p.token_ids) for p in itertools.islice(train, prompts * steps)]
    sampled: list[int] = []
    ends: list[float] = []

    def judge(completion_ids: list[list[int]], **_: object) -> list[float]:
        sampled.append(sum(map(len, completion_ids)))
        return [float(i % 2) for i in range(len(completion_ids))]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: object, **_: object) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=judge,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=out,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_steps=10_000,
                disable_tqdm=True,
                max_steps=steps,
                per_device_train_batch_size=prompts * group,
                num_generations=group,
                max_completion_length=tokens,
                steps_per_generation=1,
                learning_rate=1e-4,
                temperature=1.0,
                importance_sampling_level="sequence",
                loss_type="grpo",
                beta=0.0,
                epsilon=3e-4,
                epsilon_high=4e-4,
                gradient_checkpointing=False,
                optim="adamw_torch",
            ),
        )
        ends.append(time.perf_counter())
        trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    first = max(2, steps // 4)
    rates = [n / s for n, s in zip(sampled[first:], seconds[first:], strict=True)]
    return {
        "tokens_per_s": statistics.median(rates),
        "step_s": statistics.median(seconds[first:]),
        "tokens": statistics.median(sampled[first:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16, help="steps of each run, warm-up included")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of the sizes to run, from 0")
    parser.add_argument("--one", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one[:3], options.steps, options.one[3])))
        return
    print("| prompts x group x tokens | threads | completion tokens/s | step s | tokens per step |")
    print("|---" * 5 + "|")
    for size in (SIZES[i] for i in options.sizes or range(len(SIZES))):
        for threads in options.threads:
            command = [
                sys.executable,
                __file__,
                "--steps",
                str(options.steps),
                "--one",
                *map(str, (*size, threads)),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{done.stdout}\n{done.stderr}")
            row = json.loads(done.stdout.splitlines()[-1])
            name, speed = " x ".join(map(str, size)), f"{row['tokens_per_s']:,.0f}"
            cells = [name, str(threads), speed, f"{row['step_s']:.3f}", f"{row['tokens']:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
