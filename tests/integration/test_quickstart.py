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

import numpy as np
import psutil
import pytest

from gspo_dist.environments.calculator import Calculator
from gspo_dist.environments.python import Python
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


TOOLS = """
from dataclasses import replace
from gspo_dist.environments.calculator import Calculator
from gspo_dist.environments.python import Python

class Both:
    "A turn that ends with = is a sum, one that ends with ; a program. The second is paid twice the first."

    def __init__(self):
        self.tools, self.asked = {"=": Calculator(), ";": Python("process")}, 0

    def reset(self, prompt, seed): ...

    def step(self, turn):
        told = self.tools.get(turn[-1:], self.tools["="]).step(turn)
        self.asked += 1
        return replace(told, reward=0.0 if told.done else self.asked / 4)
"""
TURNS = (
    *("objective=gspo_token", "objective.credit=turn", "rollout.steps_ahead=1", "environment.reward=sum"),
    *("environment.stop=['=',';']", "rollout.max_completion_tokens=24", "logger.samples_per_step=16"),
)


def test_a_learner_that_dies_too_often_is_named_with_its_last_lines(model, reward_file, tmp_path):
    """It dies in a run of episodes with two real tools, begun ahead, with an advantage for every turn."""
    run_dir, source = tmp_path / "run", tmp_path / "tools.py"
    source.write_text(TOOLS)
    process = start(
        model, reward_file, run_dir, "steps=400", "data.heldout=null", "checkpoint.restarts=0", *TURNS,
        f"environment.factory='{source}:Both'",
    )  # fmt: skip
    try:
        wait_for_step(process, run_dir, 3)
        kill(process, "learner-1")
        output = finish(process, timeout=120)
    finally:
        end(process)
    assert process.returncode == 1
    assert "learner-1 died" in output, output
    assert "last lines of its log" in output
    check_episodes(run_dir)
    check_sampled_as_told(model, run_dir)


def check_episodes(run_dir: Path) -> None:
    """What was trained: turns with the tools' own answers, masks, versions, an advantage for each turn."""
    rows = [row for row in read_jsonl(run_dir / "episodes.jsonl") if row["step"] <= 3]
    assert [row["rollout_id"] for row in rows] == list(range(48))
    tools = {"=": Calculator(), ";": Python("process")}
    asked: dict[str, list[tuple[str, str]]] = {"=": [], ";": []}
    unsaid, differ = {1: 0, 2: 0, 3: 0}, 0
    for row in rows:
        mask = np.zeros(len(row["tokens"]), bool)
        for turn in row["turns"]:
            mask[turn["start"] : turn["end"]] = True
            assert as_text(row["tokens"][turn["start"] : turn["end"]]) == turn["said"]
            if turn["stop"] > turn["end"]:
                assert as_text(row["tokens"][turn["end"] : turn["stop"]]) == turn["answer"]
            if turn["reward"]:
                asked[turn["said"][-1]].append((turn["said"], turn["answer"]))
        assert row["mask"] == mask.astype(int).tolist()
        unsaid[row["step"]] += int((~mask).sum())
        for name, nothing in (("versions", -1), ("logprobs", 0.0), ("advantages", 0.0)):
            assert set(np.array(row[name])[~mask]) <= {nothing}
        newest = 2 * (row["step"] - 1)  # two mini-batches a step, and at most one step old
        assert set(np.array(row["versions"])[mask]) <= set(range(max(0, newest - 2), newest + 1))
        differ += len(set(np.array(row["advantages"])[mask])) > 1
        paid = sum(turn["reward"] for turn in row["turns"])
        assert row["reward"] == pytest.approx(paid + row["parts"]["function"])
    assert differ >= 3
    for sign, tool in tools.items():
        assert len(asked[sign]) >= 3
        for said, answer in asked[sign][:3]:
            assert tool.step(said).text == answer
    assert any(answer != "?" for _, answer in asked["="])
    metrics = [row for row in read_jsonl(run_dir / "metrics.jsonl") if row["step"] in unsaid]
    assert [row["environment/failed_fraction"] for row in metrics] == [0.0] * 3
    calls = sum(len(own) for own in asked.values())
    assert sum(16 * row["reward/tool_calls"] for row in metrics) == pytest.approx(calls)
    for row in metrics:
        told = row["environment/token_fraction"] * 16 * row["rollout/completion_tokens_mean"]
        assert told == pytest.approx(unsaid[row["step"]])


def as_text(pieces: list[str]) -> str:
    return "".join(piece for piece in pieces if piece not in ("<pad>", "<eos>", "<unk>"))


def check_sampled_as_told(model: Path, run_dir: Path) -> None:
    """The log-probs of the first policy's episodes are HF's, of the very ids that were trained.

    An engine that had been given other ids, or whose tokens had been read as text and encoded again, would
    have other log-probs. The learner, which saw the packed ids, has the engine's too.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [row for row in read_jsonl(run_dir / "episodes.jsonl") if max(row["versions"]) == 0]
    assert {row["rollout_id"] for row in rows} >= set(range(16))
    assert sum(0 in row["mask"] for row in rows) >= 3
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([*prompt, *tokenizer.convert_tokens_to_ids(row["tokens"])])
        with torch.no_grad():
            table = policy(ids[None]).logits[0].log_softmax(-1)
        wanted = table[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :, 0].numpy()
        mask = np.array(row["mask"], bool)
        assert np.abs(wanted - row["logprobs"])[mask].max() < 1e-4  # they are written with four decimals
    first = next(row for row in read_jsonl(run_dir / "metrics.jsonl") if row["step"] == 1)
    assert first["mismatch/abs_log_ratio_max"] < 1e-5
