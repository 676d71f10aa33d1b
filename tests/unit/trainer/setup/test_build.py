"""A run put together: what is refused before any process starts, and which part gets what."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gspo_dist.checkpoint import hold
from gspo_dist.data.cursor import PromptCursor
from gspo_dist.data.training import load_training
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.trainer.checkpointing import save
from gspo_dist.trainer.setup import build as module
from gspo_dist.trainer.setup.build import build
from gspo_dist.trainer.setup.checks import load_tokenizer
from gspo_dist.trainer.setup.processes import Parts
from tests.unit.trainer.setup.test_factories import info
from tests.unit.trainer.small import BookLearner, config


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """What was started and ended, instead of learner and engines."""
    said: list[str] = []

    def start(*told) -> Parts:
        said.append("started")
        pool, rewards = SimpleNamespace(runs_beside=False), SimpleNamespace()
        return Parts(BookLearner(), pool, rewards, info(), lambda: said.append("ended"))

    monkeypatch.setattr(module, "start_parts", start)
    return said


def test_an_exact_run_stops_at_the_first_token_that_differs(
    model, reward_file, tmp_path, started, monkeypatch
):
    c = config(model, reward_file, tmp_path / "run")
    object.__setattr__(c, "learner", replace(c.learner, consistency="exact"))
    run = build(c)
    try:
        assert run.guard.exact
        mini = SimpleNamespace(denominators=None, batches=lambda: iter([SimpleNamespace(num_sequences=1)]))
        monkeypatch.setattr("gspo_dist.trainer.guard.lags_of", lambda batch, version: None)
        assert run.guard.loss_spec(mini, 0, recomputed=False).exact
    finally:
        run.release()


def records(folder: Path, *answers: object) -> Path:
    path = folder / "questions.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_that_the_reward_cannot_read_are_told_before_anything_starts(
    model, reward_file, tmp_path, started
):
    data = records(tmp_path, "1", {"value": 2})
    c = config(
        model,
        reward_file,
        tmp_path / "run",
        f"data.train={data}",
        "data.heldout=null",
        "reward=exact_match",
        "reward.function=exact_match",
    )
    with pytest.raises(ValueError, match=r"questions\.jsonl.*2"):
        build(c)
    assert started == []


@pytest.mark.parametrize(
    "check", ["choose_mode", "resolve_reward", "check_model", "check_backend", "prepare_folder"]
)
def test_every_check_comes_before_the_processes(model, reward_file, tmp_path, started, monkeypatch, check):
    def refuses(*told):
        raise ValueError(f"{check} refuses")

    monkeypatch.setattr(module, check, refuses)
    with pytest.raises(ValueError, match=f"{check} refuses"):
        build(config(model, reward_file, tmp_path / "run"))
    assert started == []


def test_the_parts_are_those_of_the_configuration(model, reward_file, tmp_path, started):
    c = config(model, reward_file, tmp_path / "run", "seed=5", "evaluation.prompts=3")
    run = build(c)
    try:
        assert started == ["started"]
        assert len(run.heldout) == 3
        assert len(run.probe_prompts) == 4
        train, _ = load_training(c.data, load_tokenizer(str(model)), max_prompt_tokens=16, seed=5)
        (source,) = train.parts.values()
        other = PromptCursor(source, seed=5, shuffle=True)
        assert [p.prompt_id for p in run.collector.cursor.next(8)] == [p.prompt_id for p in other.next(8)]
        assert run.guard.learner is run.old_logprobs.learner is run.publisher.learner is run.learner
        assert run.old_logprobs.guard is run.guard
        assert not run.guard.exact
        assert (run.publisher.config.transport, run.publisher.max_model_len) == ("shm", 24)
        assert (run.flips.seed, run.flips.replicas, run.guard.seed) == (5, 1, 5)
        assert run.completed_steps == 0
    finally:
        run.release()


def test_prompts_come_in_the_order_of_their_file_where_that_is_asked(model, reward_file, tmp_path, started):
    data = records(tmp_path, *"123456")
    files = [f"data.train={data}", "data.heldout=null", "data.shuffle=false"]
    run = build(config(model, reward_file, tmp_path / "run", *files))
    run.release()
    assert [prompt.text for prompt in run.collector.cursor.next(6)] == [f"{i} + 1 =" for i in range(6)]


def test_a_folder_without_a_checkpoint_starts_its_record_over(model, reward_file, tmp_path, started):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    build(config(model, reward_file, folder)).release()
    assert read_jsonl(folder / "metrics.jsonl") == []


@pytest.mark.parametrize("colocated", [False, True])
def test_the_publisher_knows_whether_its_engines_sleep(model, reward_file, tmp_path, started, colocated):
    c = config(model, reward_file, tmp_path / "run")
    object.__setattr__(c, "cluster", replace(c.cluster, colocated=colocated))
    run = build(c)
    run.release()
    assert run.publisher.shared is run.shared
    assert run.shared.colocated is colocated


def test_the_folder_is_held_until_the_run_is_released(model, reward_file, tmp_path, started):
    run = build(config(model, reward_file, tmp_path / "run"))
    with pytest.raises(ValueError, match="is in use by process"):
        hold(tmp_path / "run")
    run.release()
    assert started == ["started", "ended"]
    hold(tmp_path / "run").close()


def test_a_run_that_cannot_be_put_together_ends_what_it_started(
    model, reward_file, tmp_path, started, monkeypatch
):
    def fails(*told, **more):
        raise RuntimeError("no objective")

    monkeypatch.setattr(module, "OffsetGuard", fails)
    with pytest.raises(RuntimeError, match="no objective"):
        build(config(model, reward_file, tmp_path / "run"))
    assert started == ["started", "ended"]
    hold(tmp_path / "run").close()


def test_a_folder_with_a_checkpoint_is_continued(model, reward_file, tmp_path, started):
    c = config(model, reward_file, tmp_path / "run")
    run = build(c)
    run.tokens_seen = 77
    save(run, 2)
    run.release()
    again = build(c)
    again.release()
    assert (again.completed_steps, again.tokens_seen) == (2, 77)
    assert again.learner.calls[-1][0] == "load"
