"""The main job with its real engines and processes: Ray, two vLLM engines, two DeepSpeed ranks. It is killed,
resumed and maimed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
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
    "learner.timeout_s=60",
    "flips.every=1",
    "rollout.kv_cache_gib=0.05",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(
        build_model(Shape(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, expert_hidden=32), seed=0),
        folder,
    )
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(
        "def sevens(prompt, completion):\n    return completion.text.count('7') / max(1, len(completion))\n"
    )
    return path


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


@pytest.fixture(scope="module")
def whole(model, reward_file, tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    process = start(model, reward_file, run_dir, "steps=6", "checkpoint.every=2")
    output = finish(process)
    assert process.returncode == 0, output
    return run_dir


def test_the_run_folder_of_a_whole_run(whole):
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(7))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["policy_version"] == 12
    assert set(summary["peak_memory_bytes"]) == {"engine-0", "engine-1", "learner-0", "learner-1"}
    for name in ("curves.png", "flips_engine.png", "flips_update.png", "samples.jsonl", "config.json"):
        assert (whole / name).stat().st_size > 0
    assert list((whole / "wandb").glob("offline-run-*/*.wandb"))
    for row in rows[1:]:  # fp32: engine and learner are one policy
        assert row["mismatch/abs_log_ratio_max"] < 1e-5
        assert row["routing/engine/flip_fraction"] == 0.0
        assert row["objective/mini_batch_0/clip_fraction"] == 0.0


def test_a_run_killed_and_resumed_equals_one_that_was_not(whole, model, reward_file, tmp_path):
    """SIGKILL to the driver between checkpoints, then the same command again."""
    run_dir = tmp_path / "run"
    process = start(model, reward_file, run_dir, "steps=6", "checkpoint.every=2")
    try:
        wait_for_step(process, run_dir, 3)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for child in children:  # what a dead driver leaves is the cluster's to clean; here it is ours
            if child.is_running():
                child.kill()
    finally:
        end(process)
    resumed = start(model, reward_file, run_dir, "steps=6", "checkpoint.every=2")
    output = finish(resumed)
    assert resumed.returncode == 0, output
    assert values(run_dir) == values(whole)


@pytest.mark.parametrize("victim", ["engine-1", "learner-1"])
def test_a_process_that_dies_is_named_with_its_last_lines(model, reward_file, tmp_path, victim):
    run_dir = tmp_path / "run"
    process = start(model, reward_file, run_dir, "steps=400", "evaluation.every=0", "data.heldout=null")
    try:
        wait_for_step(process, run_dir, 1)
        kind = "EngineProcess" if victim.startswith("engine") else "LearnerRank"
        found = sorted(
            (
                p
                for p in psutil.Process(process.pid).children(recursive=True)
                if f"ray::{kind}" in " ".join(p.cmdline())
            ),
            key=lambda p: p.create_time(),
        )
        assert len(found) == 2
        which = next(p for p in found if any(f.path.endswith(f"{victim}.log") for f in _logs(p)))
        which.send_signal(signal.SIGKILL)
        output = finish(process, timeout=120)
    finally:
        end(process)
    assert process.returncode == 1
    assert f"{victim} died" in output, output
    assert "last lines of its log" in output


def _logs(process: psutil.Process) -> list:
    """Where a process's stdout goes, as psutil names open files; not every system lists append-only logs."""
    target = os.readlink(f"/proc/{process.pid}/fd/1")
    return [type("Log", (), {"path": target})]
