"""launch/compare_qwen3_30b_a3b.sh --slurm, to its end: two arms of a toy on two hosts. Minutes, so no test:

    python -m tests.integration.compare_hosts FOLDER

The launcher, the study, its layout and the Megatron learner are those of the 30B comparison. `TOY` makes a
model of two layers of it, on hosts without GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.metrics.jsonl import read_jsonl
from tests.integration.hosts import Hosts, need_hosts
from tests.integration.ray_hosts import ENV, ROOT
from tests.integration.slurm import TOOLS, Slurm

ARMS = ("gspo", "grpo")
STEPS = 2
TOY = (
    "learner.world_size=2",
    "learner.precision=fp32",
    "learner.token_budget=256",
    "learner.threads=1",
    "learner.timeout_s=120",
    "learner.megatron.tensor_parallel=1",
    "learner.megatron.expert_parallel=2",
    "learner.megatron.optimizer_cpu_offload=false",
    "rollout.engines=1",
    "rollout.tensor_parallel=1",
    "rollout.precision=fp32",
    "rollout.threads=1",
    "rollout.enforce_eager=true",
    "rollout.kv_cache_gib=0.05",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "rollout.max_prompt_tokens=16",
    "rollout.max_completion_tokens=8",
    "reward.workers=1",
    "evaluation.prompts=4",
    "evaluation.samples=2",
    "flips.every=1",
    "plan.gpu=null",
    f"steps={STEPS}",
)


def write_inputs(folder: Path) -> list[str]:
    """A model and questions in `folder`; the overrides that name them."""
    shape = Shape(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, expert_hidden=32)
    save_model(build_model(shape, seed=0), folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    for name, first in (("train", 10), ("heldout", 50)):
        sums = [{"prompt": f"{n}+{n + 1}=", "answer": str(2 * n + 1)} for n in range(first, first + 32)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
    return [
        f"model.path={folder}/model",
        f"data.train={folder}/train.jsonl",
        f"data.heldout={folder}/heldout.jsonl",
    ]


def main(folder: Path) -> None:
    need_hosts(*TOOLS)
    folder = folder.absolute()
    folder.mkdir(parents=True)
    inputs = write_inputs(folder)
    with Hosts(2, folder / "hosts", ENV) as hosts, Slurm(hosts, folder / "slurm") as slurm:
        # sbatch reads these before the lines of launch/slurm.sbatch: to wait, where the log goes, no GPUs.
        submit = {"SBATCH_WAIT": "1", "SBATCH_OUTPUT": f"{folder}/job.log", "SBATCH_GPUS_PER_NODE": "0"}
        status = (
            hosts[0]
            .start(
                ROOT / "launch/compare_qwen3_30b_a3b.sh",
                *("--nodes", "2", "--slurm", *inputs, f"study.dir={folder}/study"),
                f"study.arms=[{','.join(ARMS)}]",
                *TOY,
                env={**slurm.env, **submit, "GSPO_ROOT": str(ROOT)},
                stdout=subprocess.DEVNULL,
            )
            .wait()
        )
        left = [word for host in hosts for word in host.run("ps", "-eo", "comm").stdout.split()]
    if status or "raylet" in left:
        raise RuntimeError(f"exit status {status}\n{(folder / 'job.log').read_text()}")
    for arm in ARMS:
        run = folder / "study" / arm / "seed-0"
        print(arm, [row["step"] for row in read_jsonl(run / "metrics.jsonl")], end=" ")
        print(" ".join((run / "logs/places.txt").read_text().split()))
    print((folder / "study/report/report.md").read_text().splitlines()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
