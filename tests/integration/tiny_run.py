"""The main job at a test's size: as a command, and what its run folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from gspo_dist.metrics.jsonl import read_jsonl

TINY = [
    "experiment=quickstart",
    "model=local",
    "learner.token_budget=128",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_prompt_tokens=16",
    "rollout.max_completion_tokens=8",
    "mini_batches=2",
    "evaluation.prompts=4",
    "evaluation.every=0",
    "learner.threads=1",
    "rollout.threads=1",
    "logger.console=false",
    "rollout.weight_sync.timeout_s=60",
    "rollout.weight_sync.probe_every=1",
    "learner.timeout_s=60",
    "flips.every=1",
    "rollout.kv_cache_gib=0.05",
]


def start(model: Path, reward: Path, run_dir: Path, *extra: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "gspo_dist",
        "train",
        *TINY,
        f"model.path={model}",
        "reward=function",
        f"reward.function='{reward}:sevens'",
        f"run_dir={run_dir}",
        *extra,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )


def finish(process: subprocess.Popen, timeout: float = 240.0) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kills what a run started, by id: its own tree (Ray's daemons are children of the driver)."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, timeout: float = 180.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        rows = read_jsonl(run_dir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached in {timeout:.0f} s")


def values(run_dir: Path) -> list[dict]:
    timed = ("time/", "perf/", "sync/check_fraction", "sync/gib_per_s")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)}
        for row in read_jsonl(run_dir / "metrics.jsonl")
    ]
