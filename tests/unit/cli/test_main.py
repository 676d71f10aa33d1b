"""The command line: bad input ends with one message and status 2, and every command has a file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gspo_dist
from gspo_dist.cli.main import COMMANDS, USAGE, main


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trains"], "no command 'trains'; did you mean 'train'"),
        (
            ["train", "learner.optimiser.lr=3"],
            "unknown config key 'learner.optimiser.lr'. did you mean 'learner.opt",
        ),
        (["train", "rollout.group_size=abc"], "rollout.group_size must be a whole number: got 'abc'"),
        (["train", "learner=mega"], "learner=mega is none of its options: did you mean 'megatron'?"),
        (["train", "steps"], "overrides have the form key=value: got 'steps'"),
        (["train", "objective=grpo_r2", "objective.old_logprobs=rollout"], "r2 needs recompute"),
        (["train", "-m", "lerner=eager,deepspeed"], "unknown config key 'lerner'. did you mean 'learner'"),
        (["evaluate", "data.train=/a=b.jsonl"], "write 'data.train=\"/a=b.jsonl\"'"),
        (["plan", "plan.nodes=abc"], "plan.nodes must be a whole number: got 'abc'"),
        (["plan", "plan.nodes=0"], "plan.nodes must be at least 1: got 0"),
        (["plan", "plan.gpu=H100", "plan.gpus_per_node=0"], "plan.gpus_per_node must be at least 1: got 0"),
        (["plan", "plan.nodes"], "overrides have the form key=value: got 'plan.nodes'"),
        (["plan", "plan.node=2"], "unknown config key 'plan.node'. did you mean 'plan.nodes'?"),
        (["plan", "plan.gpu="], "plan.gpu needs a value"),
        (["plan", "plan.gpu=H1000"], "hardware must name one GPU: got 'H1000'"),
        (["plan", f"plan.model={__file__}"], "test_main.py must be an HF config.json: it is not JSON"),
        (
            ["plan", "plan.model=nothing-here"],
            "plan.model must be a folder with a config.json or one of Qwen3-30B-A3B",
        ),
        (["compare", "--dry"], "gspo compare knows --dry-run, --report-only, --html: got --dry"),
        (["legality", "gspo"], "gspo legality takes no arguments: got 'gspo'"),
        (["workspace", "--study", "x"], "got neither; give --to FILE, --create, or both"),
        (["doctor", "now"], "gspo doctor takes --cluster[=HEAD:PORT] [FOLDER ...] or nothing: got 'now'"),
        (["completion", "fish"], "completion knows bash: got fish"),
        (
            ["export", "--run", "/not/here", "--to", "/tmp/x"],
            "not a run folder: /not/here has no config.json",
        ),
    ],
)
def test_bad_input_ends_with_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"steps": 3, "lea', "JSONDecodeError: Unterminated string"),
        ("", "JSONDecodeError: Expecting value"),
        ("[1]", "it holds a list"),
        ('{"steps": "three"}', "steps must be a whole number: got 'three'"),
        ('{"cluster": {"plan_gpu": "H100"}}', "unknown config key 'cluster.plan_gpu'"),
    ],
)
def test_a_torn_configuration_of_a_run_folder_is_named(text: str, problem: str, tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["export", "--run", str(tmp_path), "--to", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert problem in said
    assert str(tmp_path / "config.json") in said


def test_usage_names_every_command_and_every_command_has_a_file():
    assert re.findall(r"^  (\S+)", USAGE, re.M) == list(COMMANDS)
    folder = Path(gspo_dist.__file__).parent / "cli"
    assert [name for name, file in COMMANDS.items() if not (folder / f"{file}.py").is_file()] == []


@pytest.mark.parametrize("word", ["-h", "--help", "help", None])
def test_help_is_the_usage(word, capsys):
    main([word] if word else [])
    assert capsys.readouterr().out == USAGE + "\n"


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version_is_the_packages(word, capsys):
    main([word])
    assert capsys.readouterr().out == f"gspo_dist {gspo_dist.__version__}\n"


def test_the_package_runs_as_the_command():
    out = subprocess.run(
        [sys.executable, "-m", "gspo_dist", "--help"], capture_output=True, text=True, check=True
    )
    assert out.stdout == USAGE + "\n"


def test_workspace_writes_the_page_of_the_named_study(tmp_path: Path, capsys):
    path = tmp_path / "page.json"
    main(["workspace", "--study", "mine", "--project", "p", "--mini-batches", "8", "--to", str(path)])
    assert capsys.readouterr().out == f"{path}\n"
    page = json.loads(path.read_text())
    assert (page["name"], page["project"], page["filter"]) == ("mine: arms", "p", {"tags": "mine"})
    assert "objective/mini_batch_7/clip_fraction" in path.read_text()


def test_legality_prints_the_table(capsys):
    main(["legality"])
    told = capsys.readouterr().out
    assert "| any | rollout | r2 | any | any | refused: rule 1 |" in told
    assert "* the ratio ignores the age (" in told  # age_rules
    assert "- rollout.tensor_parallel > 1: " in told  # learner.consistency=exact
