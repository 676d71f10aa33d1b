"""The command line: bad input ends with one message and status 2; every objective composes; completion offers keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist import cli

OBJECTIVES = sorted(p.stem for p in (cli.conf_dir() / "objective").glob("*.yaml") if p.stem != "custom")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_group_is_a_legal_run(name):
    config = cli.run_config([f"objective={name}"])
    assert config.objective.name in name or name.startswith(config.objective.name)


def test_experiment_quickstart_is_legal():
    config = cli.run_config(["experiment=quickstart"])
    assert config.objective.name == "gspo"
    assert config.objective.old_logprobs == "rollout"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'"),
        (["train", "learner.optimzer.lr=3"], "unknown config key 'learner.optimzer.lr'. did you mean 'learner.optimizer.lr'"),
        (["train", "rollout.group_size=abc"], "could not be converted to Integer"),
        (["train", "learner=mega"], "learner/mega"),
        (["train", "steps"], "overrides have the form key=value: got 'steps'"),
        (["train", "objective=grpo_r2", "objective.old_logprobs=rollout"], "r2 needs recompute"),
    ],
)
def test_bad_input_ends_with_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_cfg_job_prints_the_resolved_configuration():
    out = subprocess.run(
        [sys.executable, "-m", "gspo_dist.cli", "train", "steps=7", "--cfg", "job"], capture_output=True, text=True, check=True
    ).stdout
    assert "steps: 7\n" in out and "  clip_low: 0.0003\n" in out


def test_completion_offers_the_keys_of_the_schema(tmp_path: Path):
    script = tmp_path / "complete.sh"
    gspo = Path(sys.executable).with_name("gspo")
    script.write_text(
        f'eval "$({gspo} completion bash)"\nPATH="{gspo.parent}:$PATH"\n'
        'COMP_LINE="gspo train learner.optimizer.l"; COMP_WORDS=(gspo train learner.optimizer.l); COMP_CWORD=2\n'
        '_gspo_complete; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    out = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False).stdout
    assert "learner.optimizer.lr=" in out
