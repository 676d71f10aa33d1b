"""Whole runs in this process whose records fail: what only records is lost, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.metrics import jsonl
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.wandb_sink import WandbSink
from gspo_dist.trainer.loop import train
from gspo_dist.trainer.setup.build import build

pytestmark = pytest.mark.slow

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run_of(model, tmp_path):
    """overrides -> (summary, rows) of a run to its end; the run folder is tmp_path/run."""
    (tmp_path / "mine.py").write_text(
        "def length(prompt, completion):\n    return float(len(completion) % 2)\n"
    )

    def make(*overrides: str) -> tuple[dict, list[dict]]:
        config = run_config(
            [
                *("cluster=in_process", "learner=eager", "rollout=reference", "logger=quiet"),
                *("model=local", f"model.path={model}", f"run_dir={tmp_path / 'run'}"),
                *("reward=function", f"reward.function='{tmp_path / 'mine.py'}:length'"),
                *("steps=2", "mini_batches=2", "flips.every=1", "evaluation.prompts=2"),
                *("rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_prompt_tokens=16"),
                *("rollout.max_completion_tokens=4", "learner.token_budget=128"),
                *("learner.precision=fp32", "rollout.precision=fp32"),
                *overrides,
            ]
        )
        run = build(config)
        try:
            summary = train(run)
        finally:
            run.release()
        return summary, read_jsonl(tmp_path / "run" / "metrics.jsonl")

    return make


@pytest.fixture
def mixed(tmp_path) -> str:
    """A data file whose answers are 42 in one record and "x+1" in the next."""
    path = tmp_path / "mixed.jsonl"
    answers = [42, "x+1", 1.5, "42"]
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "answer": a}) + "\n" for n, a in enumerate(answers))
    )
    return str(path)


def test_answers_of_two_types_reach_the_end_with_wandb(run_of, mixed, no_wandb, tmp_path):
    """Real wandb, offline: its table takes one type per column, and this ended the run after step 1."""
    import wandb

    try:
        data = ["data=file", f"data.train={mixed}", "data.heldout=null"]
        _, rows = run_of(*data, "logger.wandb.mode=offline", "logger.samples_per_step=8")
    finally:
        wandb.teardown()
    assert [row["step"] for row in rows] == [1, 2]  # no evaluation before the first
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 16
    assert len(list((tmp_path / "run").rglob("*.table.json"))) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json").is_file()


def test_wandb_that_fails_at_every_call_costs_nothing_else(run_of, no_wandb, monkeypatch, caplog):
    import wandb

    def broken(*_):
        raise ConnectionError("the service process is gone")

    for verb in ("log", "samples", "image", "close"):
        monkeypatch.setattr(WandbSink, verb, broken)
    try:
        summary, rows = run_of("logger.wandb.mode=offline")
    finally:
        wandb.teardown()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert summary["policy_version"] == 4
    for what in ("the step's numbers", "samples", "pictures", "the summary"):
        assert caplog.text.count(f"the run goes on without {what} in WandbSink: ConnectionError") == 1


def test_samples_and_pictures_that_cannot_be_written_cost_nothing_else(run_of, monkeypatch, tmp_path, caplog):
    real = jsonl.append

    def full_for_samples(path, rows):
        if path.name == "samples.jsonl":
            raise FULL
        real(path, rows)

    def full(*_, **__):
        raise FULL

    monkeypatch.setattr(jsonl, "append", full_for_samples)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    monkeypatch.setattr("numpy.savez_compressed", full)
    summary, rows = run_of()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policy_version"] == 4
    assert summary["checkpoint"].endswith("step-000002")
    assert caplog.text.count("without samples in SamplesFile: OSError") == 1
    for what in ("curves.png", "the heat maps of routing flips", "the flips measured so far"):
        assert f"the run goes on without {what}" in caplog.text or f"{what}: OSError" in caplog.text


def test_metrics_that_cannot_be_written_stop_the_run_and_it_goes_on_later(run_of, monkeypatch, tmp_path):
    """The disk is full at step 2: the run stops with the way out. With room again it goes on to the end."""
    real = jsonl.append

    def full_at_2(path, rows):
        if path.name == "metrics.jsonl" and rows[0]["step"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, rows)

    monkeypatch.setattr(jsonl, "append", full_at_2)
    with pytest.raises(OSError, match="No space left") as caught:
        run_of("steps=3", "checkpoint.every=1")
    notes = "\n".join(caught.value.__notes__)
    assert "make room and repeat the command" in notes
    assert "step-000001" in notes
    monkeypatch.setattr(jsonl, "append", real)
    summary, rows = run_of("steps=3", "checkpoint.every=1")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert summary["policy_version"] == 6


def test_files_torn_by_a_kill_are_taken_up_to_their_last_whole_line(run_of, tmp_path, caplog):
    run_of("checkpoint.every=1")
    folder = tmp_path / "run"
    before = read_jsonl(folder / "metrics.jsonl")
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = folder / name
        os.truncate(path, path.stat().st_size - 10)
    (folder / "flips_update.npz").write_bytes((folder / "flips_update.npz").read_bytes()[:50])
    shutil.rmtree(folder / "checkpoints" / "step-000002")  # nor was step 2 saved
    _, rows = run_of("checkpoint.every=1")
    timed = ("time/", "perf/", "sync/")
    assert [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows] == [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in before
    ]
    assert f"{folder / 'metrics.jsonl'}: 1 torn line(s) dropped" in caplog.text
    assert "the run goes on without the flips measured before" in caplog.text
