"""Every configuration of conf/ composes to a legal run, and the command prints what it composed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist.cli.compose import compose, conf_dir, run_config, split_arguments
from gspo_dist.cli.explain import group_options
from gspo_dist.cli.main import main
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import to_mapping


@pytest.mark.parametrize("name", [n for n in group_options("objective") if n != "custom"])
def test_every_objective_group_is_a_legal_run(name):
    config = run_config([f"objective={name}"])
    # MaxRL is an advantage, with the loss of REINFORCE.
    loss = "reinforce" if name == "maxrl" else name
    assert config.objective.name in loss or loss.startswith(config.objective.name)


@pytest.mark.parametrize("name", group_options("experiment"))
def test_every_experiment_is_a_legal_run(name):
    assert run_config([f"experiment={name}"]).run_dir.startswith("runs/")


def test_the_quickstart_is_gspo_on_the_engines_log_probs():
    config = run_config(["experiment=quickstart"])
    assert (config.objective.name, config.objective.old_logprobs) == ("gspo", "rollout")
    assert (config.learner.world_size, config.rollout.engines, config.steps) == (2, 2, 30)


def test_a_composed_configuration_has_every_knob():
    """Nothing is left out between the dataclasses and hydra: what is composed is what a run folder stores."""
    composed = compose(["experiment=quickstart"])
    assert to_mapping(run_config(["experiment=quickstart"])) == composed
    assert set(composed) == set(to_mapping(RunConfig()))


def test_cfg_job_prints_the_resolved_configuration():
    out = subprocess.run(
        [sys.executable, "-m", "gspo_dist", "train", "steps=7", "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "steps: 7\n" in out
    assert "  clip_low: 0.0003\n" in out


def test_a_folder_of_the_users_own_configurations_is_searched_too(tmp_path: Path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nsteps: 11\n")
    assert compose(["experiment=mine"], [tmp_path])["steps"] == 11
    main(["train", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job"])
    assert "steps: 11\n" in capsys.readouterr().out


def test_arguments_are_split_into_overrides_and_flags_with_values():
    assert split_arguments(["a=1", "--cfg", "job", "-cd=/x", "--multirun", "b=2"]) == (
        ["a=1", "b=2"],
        {"--cfg": "job", "--config-dir": "/x"},
    )


def test_the_packages_folder_of_configs_is_the_checkouts() -> None:
    """A link, so that a wheel packs the files that a user edits."""
    root = Path(__file__).resolve().parents[3]
    assert conf_dir().resolve() == root / "conf"
    assert conf_dir().is_symlink()


def test_what_only_prints_needs_no_application_of_hydra(monkeypatch, capsys) -> None:
    import hydra

    from gspo_dist.cli import compose

    def started(**kwargs):
        raise AssertionError("an application of hydra")

    monkeypatch.setattr(hydra, "main", started)
    seen = []
    compose.run_as_application("gspo x", ["seed=7"], seen.append, light=True)
    assert [config.seed for config in seen] == [7]
    with pytest.raises(SystemExit) as stop:
        compose.run_as_application("gspo x", ["sed=7"], seen.append, light=True)
    assert stop.value.code == 2
    assert "sed" in capsys.readouterr().err
    for more in (["--cfg", "job"], ["-m"], ["--info"]):
        with pytest.raises(AssertionError, match="an application of hydra"):
            compose.run_as_application("gspo x", ["seed=7", *more], seen.append, light=True)
    with pytest.raises(AssertionError, match="an application of hydra"):
        compose.run_as_application("gspo x", ["seed=7"], seen.append)


def test_a_plan_only_prints(monkeypatch, capsys) -> None:
    import hydra

    from gspo_dist.cli.plan import main

    def started(**kwargs):
        raise AssertionError("an application of hydra")

    monkeypatch.setattr(hydra, "main", started)
    main(["experiment=qwen3_30b_a3b/gspo", "layout=qwen3_30b_a3b_4x8"])
    assert "rollouts begun ahead" in capsys.readouterr().out
