"""Suites beside the learner of a real run: Ray, two engines, a learner, rewards. All of it on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.trainer.evaluate import evaluate_suites
from tests.unit.evaluation.small import write_jsonl
from tests.unit.trainer.small import config, go, values


def sampled(folder: Path) -> list[str]:
    return [row["completion"] for row in read_jsonl(folder / "samples.jsonl")]


def test_suites_beside_a_learner_on_ray_are_those_of_the_weights_alone_and_change_nothing(
    model, reward_file, tmp_path
):
    """The run trains as one in a single process without suites. What each step's suite gives is what
    `gspo evaluate` gives on the folder of that step's weights, token by token.
    """
    reward = f"reward.function='{reward_file}:sevens'"
    words = (reward, "logger.samples_per_step=16", "data.heldout=null", "checkpoint.save_last=false")
    _, plain = go(config(model, reward_file, tmp_path / "plain", *words))
    file = write_jsonl(tmp_path / "own.jsonl", [{"problem": f"{i}+1=", "answer": "7"} for i in range(3)])
    suite = (
        reward,
        "evaluation.suites=[own]",
        f"+evaluation.options.own={{file: {file}, reward: exact_match, samples: 4, temperature: 1.0}}",
    )
    on_ray = ("cluster=local", "rollout.engines=2", "rollout.threads=1", "learner.threads=1")
    every = ("evaluation.every=1", "checkpoint.hf_every=1", "checkpoint.keep_hf=9")
    run = config(model, reward_file, tmp_path / "run", *words, *on_ray, *every, *suite)
    _, rows = go(run)
    assert sampled(tmp_path / "run") == sampled(tmp_path / "plain")
    steps = [row for row in values(rows) if row["step"]]
    for row, expected in zip(steps, [row for row in values(plain) if row["step"]], strict=True):
        for key, value in expected.items():
            if not key.startswith(("sync/", "eval/")):
                assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    assert [row.get("eval/at_step") for row in steps] == [0.0, 1.0, 3.0]  # step 2's are in row 3, below
    for step in (1, 3):
        folder = tmp_path / f"run/hf/step-{step:06d}"
        (alone,) = evaluate_suites(config(folder, reward_file, tmp_path / f"alone-{step}", *suite))
        beside = json.loads((tmp_path / f"run/evaluation/step_{step:06d}/own/result.json").read_text())
        assert [s["completion"] for s in beside["samples"]] == [s["completion"] for s in alone.samples]
        assert beside["metrics"] == alone.metrics
        assert len({s["completion"] for s in alone.samples}) > 6
