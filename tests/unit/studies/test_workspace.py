"""The W&B page of a study names only metrics that runs log, and shows one line an arm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_dist.cli.main import run_config
from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.metrics.sinks import read_jsonl
from gspo_dist.studies import workspace
from gspo_dist.trainer.loop import train
from gspo_dist.trainer.setup.build import build


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """Arm -> names of the metrics of a real run with 4 mini-batches: the eager learner and the reference engine."""
    folder = tmp_path_factory.mktemp("runs")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    names = {}
    for arm in ("gspo", "grpo_r3"):
        run = build(
            run_config(
                [
                    "cluster=in_process",
                    "learner=eager",
                    "rollout=reference",
                    "model=local",
                    f"model.path={folder / 'model'}",
                    f"objective={arm}",
                    "reward=arithmetic",
                    "logger=quiet",
                    "steps=1",
                    "mini_batches=4",
                    "flips.every=1",
                    f"run_dir={folder / arm}",
                    "rollout.prompts_per_step=4",
                    "rollout.group_size=2",
                    "rollout.max_prompt_tokens=16",
                    "rollout.max_completion_tokens=8",
                    "learner.token_budget=64",
                    "learner.precision=fp32",
                    "rollout.precision=fp32",
                    "evaluation.prompts=4",
                    "checkpoint.save_last=false",
                ]
            )
        )
        try:
            train(run)
        finally:
            run.release()
        names[arm] = {key for row in read_jsonl(Path(folder / arm / "metrics.jsonl")) for key in row}
    return names


def test_every_panel_names_a_metric_that_runs_log(logged):
    panels = [panel for section in workspace.sections(4) for panel in section.panels]
    shown = {panel.metric for panel in panels} | {panel.x for panel in panels}
    replayed = {"routing/replay_bytes_per_token"}
    assert shown - logged["grpo_r3"] <= {"contract/offset_clip_widths"}  # of runs on the engine's log-probs
    assert shown - logged["gspo"] == replayed
    assert len({(p.metric, p.x) for p in panels}) == len({p.title for p in panels}) == len(panels)


def test_the_description_holds_the_study_its_grouping_and_all_panels(tmp_path):
    workspace.main(["--study", "mine", "--mini-batches", "8", "--to", str(tmp_path / "page.json")])
    page = json.loads((tmp_path / "page.json").read_text())
    assert (page["project"], page["filter"], page["group_by"]) == ("gspo_dist", {"tags": "mine"}, "tags")
    metrics = [panel["metric"] for section in page["sections"] for panel in section["panels"]]
    assert metrics[0] == "eval/heldout/accuracy"
    assert "objective/mini_batch_7/clip_fraction" in metrics
    assert "objective/mini_batch_3/clip_fraction" not in metrics


def test_saving_a_page_without_an_owner_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        workspace.main(["--study", "mine", "--create"])
    assert stop.value.code == 2
    assert "name it with --entity" in capsys.readouterr().err
