"""The main job with its real engines and processes: Ray, two vLLM engines, two DeepSpeed ranks. It is killed,
resumed and maimed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from gspo_dist.metrics.jsonl import read_jsonl
from tests.integration.tiny_run import end, finish, start, values, wait_for_step


def test_the_run_folder_of_a_whole_run(whole):
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(5))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["policy_version"] == 8
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
    process = start(model, reward_file, run_dir, "steps=4", "checkpoint.every=2")
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
    resumed = start(model, reward_file, run_dir, "steps=4", "checkpoint.every=2")
    output = finish(resumed)
    assert resumed.returncode == 0, output
    assert values(run_dir) == values(whole)


def kill(process: subprocess.Popen, victim: str) -> None:
    """SIGKILL to an actor of a run, found by the log that it writes."""
    kind = "EngineProcess" if victim.startswith("engine") else "LearnerRank"
    found = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if f"ray::{kind}" in " ".join(p.cmdline())
    ]
    assert len(found) == 2
    next(p for p in found if os.readlink(f"/proc/{p.pid}/fd/1").endswith(f"{victim}.log")).kill()


def wait_for_event(process: subprocess.Popen, run_dir: Path, kind: str, timeout: float = 180.0) -> dict:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for event in read_jsonl(run_dir / "events.jsonl"):
            if event["kind"] == kind:
                return event
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    raise AssertionError(f"no {kind} in {timeout:.0f} s: {read_jsonl(run_dir / 'events.jsonl')}")


def test_a_run_outlives_its_engines_and_its_learner(model, reward_file, tmp_path):
    """An engine killed: the other goes on, a new one comes. A rank killed: the run goes on by itself.

    Rollouts are begun ahead, so the engine dies with work for two steps. At the end nothing is missing.
    """
    run_dir = tmp_path / "run"
    process = start(
        model, reward_file, run_dir, "steps=400", "data.heldout=null", "rollout.steps_ahead=1",
        "objective=gspo_recompute", "checkpoint.every=1", "logger.samples_per_step=16", "flips.every=0",
    )  # fmt: skip
    try:
        wait_for_step(process, run_dir, 1)
        kill(process, "engine-1")
        death = wait_for_event(process, run_dir, "engine_death")
        assert death["who"] == "engine-1"
        assert death["what"].startswith("engine-1 died")
        returned = wait_for_event(process, run_dir, "engine_return")
        assert returned["who"] == "engine-1"
        wait_for_step(process, run_dir, returned["step"] + 1)
        kill(process, "learner-1")
        restart = wait_for_event(process, run_dir, "restart")
        assert "learner-1 died" in restart["what"]
        last = read_jsonl(run_dir / "metrics.jsonl")[-1]["step"] + 1
        wait_for_step(process, run_dir, last)
    finally:
        end(process)
    rows = [row for row in read_jsonl(run_dir / "metrics.jsonl") if row["step"] <= last]
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert (rows[-1]["health/engine_deaths"], rows[-1]["health/restarts"]) == (1.0, 1.0)
    trained = [row["rollout_id"] for row in read_jsonl(run_dir / "samples.jsonl") if row["step"] <= last]
    assert trained == list(range(16 * last))


def test_a_learner_that_dies_too_often_is_named_with_its_last_lines(model, reward_file, tmp_path):
    run_dir = tmp_path / "run"
    process = start(model, reward_file, run_dir, "steps=400", "data.heldout=null", "checkpoint.restarts=0")
    try:
        wait_for_step(process, run_dir, 1)
        kill(process, "learner-1")
        output = finish(process, timeout=120)
    finally:
        end(process)
    assert process.returncode == 1
    assert "learner-1 died" in output, output
    assert "last lines of its log" in output
