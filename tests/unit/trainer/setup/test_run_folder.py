"""When a run folder starts over, when it is resumed, and when it is refused: nothing that was
finished is lost.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_dist.checkpoint import Checkpoint
from gspo_dist.cli.compose import run_config
from gspo_dist.config.mapping import to_mapping
from gspo_dist.learners.state_files import write_layout
from gspo_dist.trainer.setup.run_folder import changed_settings, prepare_folder


@functools.cache
def config(*overrides: str):
    return run_config(["learner=eager", "steps=8", "model=local", "model.path=/m", *overrides])


def resume(folder: Path, *overrides: str, step: int = 4) -> None:
    prepare_folder(folder, config(*overrides), Checkpoint(folder / "checkpoints" / "step-000004", step, {}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder that was begun with `config()`."""
    prepare_folder(tmp_path, config(), None)
    return tmp_path


def test_a_new_folder_gets_its_configuration_and_an_identity(folder):
    assert json.loads((folder / "config.json").read_text()) == to_mapping(config())
    assert len((folder / "run_id").read_text()) == 12


def test_starting_over_gives_a_new_identity_and_resuming_keeps_it(folder):
    first = (folder / "run_id").read_text()
    resume(folder)
    assert (folder / "run_id").read_text() == first
    prepare_folder(folder, config(), None)
    assert (folder / "run_id").read_text() != first


def test_checkpoints_are_not_overwritten_by_a_run_that_will_not_resume(folder):
    manifest = folder / "checkpoints" / "step-000004" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    with pytest.raises(ValueError, match=r"holds checkpoints .* checkpoint\.resume is false"):
        prepare_folder(folder, config("seed=3"), None)
    assert json.loads((folder / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    "change",
    [
        "steps=100",
        "reward.timeout_s=99",
        "reward.workers=3",
        "environment.timeout_s=99",
        "environment.workers=3",
        "learner.timeout_s=99",
        "learner.token_budget=16384",
        "logger=quiet",
        "evaluation.every=7",
        "data.heldout=null",
        "model.cache_dir=/elsewhere",
        "checkpoint.every=3",
        "rollout.engines=3",
        "+learner.megatron.ddp.bucket_size=5",
        "+learner.megatron.transformer.recompute_modules=[moe]",
        "+learner.megatron.optimizer.optimizer_offload_fraction=0.5",
    ],
)
def test_what_only_decides_how_the_work_is_done_may_change(folder, change):
    resume(folder, change)
    assert json.loads((folder / "config.json").read_text()) == to_mapping(config(change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=5", r"seed \(was 0, now 5\)"),
        ("rollout.temperature=0.5", r"rollout\.temperature \(was 1\.0, now 0\.5\)"),
        ("objective.kl_coef=0.1", r"objective\.kl_coef \(was 0\.0, now 0\.1\)"),
        ("reward.timeout_reward=1.0", r"reward\.timeout_reward \(was 0\.0, now 1\.0\)"),
        ("environment.max_turns=3", r"environment\.max_turns \(was 8, now 3\)"),
        ("learner.optimizer.lr=0.5", r"learner\.optimizer\.lr \(was .*, now 0\.5\)"),
        ("+learner.megatron.transformer.cp_comm_type=a2a", r".*cp_comm_type \(was None, now 'a2a'\)"),
        ("+learner.megatron.optimizer.exp_avg_dtype=bfloat16", r".*dtype \(was None, now 'bfloat16'\)"),
        ("+learner.deepspeed.config.zero_optimization.sub_group_size=5", r".*size \(was None, now 5\)"),
        ("data.train=other.jsonl", r"data\.train \(was 'arithmetic', now 'other\.jsonl'\)"),
    ],
)
def test_what_decides_what_a_step_computes_is_refused_by_key_and_values_unless_accepted(
    folder, change, said, caplog
):
    key = change.lstrip("+").split("=")[0]
    way_out = rf"'checkpoint\.accept=\[{key}\]'".replace(".", r"\.").replace(r"\\.", r"\.")
    with pytest.raises(ValueError, match=f"made with other settings: {said}; restore them, .*{way_out}"):
        resume(folder, change)
    assert json.loads((folder / "config.json").read_text()) == to_mapping(config())  # as it was
    with caplog.at_level(logging.WARNING):
        resume(folder, change, f"checkpoint.accept=[{key}]")
    assert "resuming with other settings, as accepted" in caplog.text


def test_a_section_is_accepted_whole_and_covers_nothing_beside_it(folder):
    changes = ["objective.kl_coef=0.1", "objective.guard.threshold=2"]
    with pytest.raises(ValueError, match=r"objective\.guard\.threshold .*objective\.kl_coef"):
        resume(folder, *changes)
    resume(folder, *changes, "checkpoint.accept=[objective]")
    with pytest.raises(ValueError, match=r"other settings: seed"):
        resume(folder, "seed=1", *changes, "checkpoint.accept=[objective]")


def test_another_learner_cannot_be_accepted(folder):
    with pytest.raises(
        ValueError, match=r"another learner: learner\.backend \(was 'eager', now 'deepspeed'\)"
    ):
        resume(folder, "learner=deepspeed", "checkpoint.accept=[learner]")


def test_fewer_steps_than_are_done_is_said(folder):
    with pytest.raises(
        ValueError, match=r"steps must be at least those that are done: got 3, .* after step 4"
    ):
        resume(folder, "steps=3")
    resume(folder, "steps=4")


def test_a_knob_that_a_later_version_added_is_no_change_at_its_default(folder):
    old = json.loads((folder / "config.json").read_text())
    del old["objective"]["kl_coef"]
    (folder / "config.json").write_text(json.dumps(old))
    resume(folder)
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"objective\.kl_coef \(was 0\.0, now 0\.1\)"):
        resume(folder, "objective.kl_coef=0.1")


def test_changes_are_found_inside_the_sections_only():
    a = to_mapping(config())
    b = to_mapping(replace(config(), seed=1, steps=9))
    assert changed_settings(a, b, ["seed"]) == {"seed": (0, 1)}
    assert changed_settings(a, b, ["objective"]) == {}
    assert changed_settings(a, b, ["see"]) == {}  # a section is a whole word


def test_a_state_of_another_layout_is_refused_before_anything_starts(folder):
    """What the learner wrote beside its state is compared first: no acceptance resharding could need."""
    state = folder / "checkpoints" / "step-000004" / "learner"
    state.mkdir(parents=True)
    write_layout(
        state, replace(config().learner, precision="fp32" if config().learner.precision == "bf16" else "bf16")
    )
    with pytest.raises(ValueError, match="precision"):
        resume(folder, "checkpoint.accept=[learner]")
