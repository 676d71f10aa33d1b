"""What a run counts by itself: its seconds over interruptions, and where its checkpoints lie."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest

from gspo_dist.config import CheckpointConfig, RunConfig
from gspo_dist.trainer import run as run_module
from gspo_dist.trainer.run import Run


def run_of(**given):
    """A run of nothing: its parts are not asked."""
    parts = {f.name for f in fields(Run) if f.default is MISSING and f.default_factory is MISSING}
    return Run(**(dict.fromkeys(parts) | given))


def test_a_new_run_has_done_nothing():
    run = run_of()
    assert (run.completed_steps, run.tokens_seen, run.skipped_in_a_row, run.seconds_before) == (0, 0, 0, 0.0)
    assert (run.last_checkpoint, run.unfinished_save) == (None, None)
    assert (run.first_evaluation, run.last_evaluation) == ({}, {})


def test_its_seconds_are_those_of_all_its_parts(monkeypatch):
    now = iter([100.0, 107.5])
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    run = run_of(seconds_before=30.0, started=run_module.time.perf_counter())
    assert run.seconds == pytest.approx(37.5)


def test_its_clock_starts_when_it_is_made():
    assert 0.0 <= run_of().seconds < 60.0


def test_its_checkpoints_lie_in_its_folder_and_so_many_are_kept(tmp_path):
    store = run_of(run_dir=tmp_path, config=RunConfig(checkpoint=CheckpointConfig(keep=3))).store
    assert (store.root, store.keep) == (tmp_path / "checkpoints", 3)
