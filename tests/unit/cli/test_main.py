"""The command line: bad input ends with one message and status 2; every objective composes; completion offers keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_dist.cli import main as cli
from gspo_dist.cli.plan import plan_text
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.models.config_file import BUILT_IN

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
        (
            ["train", "learner.optimzer.lr=3"],
            "unknown config key 'learner.optimzer.lr'. did you mean 'learner.optimizer.lr'",
        ),
        (["train", "rollout.group_size=abc"], "could not be converted to Integer"),
        (["train", "learner=mega"], "learner/mega"),
        (["train", "steps"], "overrides have the form key=value: got 'steps'"),
        (["train", "objective=grpo_r2", "objective.old_logprobs=rollout"], "r2 needs recompute"),
        (["plan", "plan.nodes=abc"], "plan.nodes must be a whole number, at least 1: got 'abc'"),
        (["plan", "plan.nodes=0"], "plan.nodes must be a whole number, at least 1: got '0'"),
        (
            ["plan", "plan.gpu=H100", "plan.gpus_per_node=0"],
            "plan.gpus_per_node must be a whole number, at least 1: got '0'",
        ),
        (
            ["plan", "plan.gpus_per_node=-8"],
            "plan.gpus_per_node must be a whole number, at least 1: got '-8'",
        ),
        (["plan", "plan.nodes"], "overrides have the form key=value: got 'plan.nodes'"),
        (["plan", "plan.gpu="], "plan.gpu needs a value"),
        (["plan", f"plan.model={__file__}"], "test_main.py must be an HF config.json: it is not JSON"),
        (
            ["plan", "plan.model=nothing-here"],
            "plan.model must be a folder with a config.json or one of Qwen3-30B-A3B",
        ),
    ],
)
def test_bad_input_ends_with_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_cfg_job_prints_the_resolved_configuration():
    out = subprocess.run(
        [sys.executable, "-m", "gspo_dist.cli.main", "train", "steps=7", "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "steps: 7\n" in out
    assert "  clip_low: 0.0003\n" in out


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


LARGE = ["experiment=qwen3_30b_a3b/gspo", "layout=qwen3_30b_a3b_2x8"]


def verdict(text: str) -> list[str]:
    """The lines of a plan's text from its verdict on."""
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line in ("fits", "does not fit")) :]


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.megatron.sequence_parallel=false"],
        [
            "learner.megatron.token_dispatcher=allgather",
            "learner.megatron.pipeline_parallel=2",
            "learner.megatron.expert_parallel=2",
        ],
        ["learner.megatron.expert_parallel=6"],
        ["learner.precision=fp32", "learner.megatron.optimizer_cpu_offload=false"],
        ["learner.megatron.overlap_param_gather=true", "learner.megatron.overlap_grad_reduce=false"],
        ["learner.megatron.expert_bias=true", "learner.megatron.aux_loss_coef=0.01"],
        [
            "learner.megatron.tensor_parallel=8",
            "learner.megatron.pipeline_parallel=5",
            "learner.world_size=40",
        ],
    ],
)
def test_plan_and_run_refuse_a_layout_with_the_same_words(overrides):
    config = cli.run_config([*LARGE, *overrides])
    with pytest.raises(ValueError) as refused:
        check_knobs(config.learner, gpu=True)
        check_layout(config.learner.megatron, from_hf(BUILT_IN["Qwen3-30B-A3B"]), config.learner.world_size)
    assert verdict(plan_text(config)) == ["does not fit", f"  {refused.value}"]
    assert verdict(plan_text(cli.run_config(LARGE))) == ["fits"]


def test_plan_refuses_a_model_that_the_megatron_learner_does_not_build():
    said = verdict(plan_text(cli.run_config(LARGE), model="OLMoE-1B-7B"))
    assert said[0] == "does not fit"
    assert "does not know the architecture 'OlmoeForCausalLM'" in said[1]
    assert "use learner=deepspeed" in said[1]


def test_plan_refuses_an_engine_that_does_not_divide_the_heads():
    said = verdict(plan_text(cli.run_config([*LARGE, "rollout.tensor_parallel=3"])))
    assert said[:2] == [
        "does not fit",
        "  rollout.tensor_parallel must divide num_attention_heads: got 3 and 32; try 1, 2, 4, 8, 16, 32",
    ]


def test_plan_counts_the_gpus_of_a_node_by_the_gpu_unless_told():
    config = cli.run_config(LARGE)
    for given, nodes in (
        ({}, "2 x 8 H100-80GB"),
        ({"gpu": "GB200"}, "2 x 4 GB200-186GB"),
        ({"gpu": "GB200", "gpus_per_node": "8"}, "2 x 8 GB200-186GB"),
    ):
        assert f"\non {nodes}\n" in plan_text(config, **given)
    config = cli.run_config([*LARGE, "cluster.plan_gpus_per_node=2"])
    assert "\non 2 x 2 H100-80GB\n" in plan_text(config)


def test_plan_names_the_size_that_a_config_leaves_out(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=f"config.json of {tmp_path.name} must give hidden_size"):
        plan_text(cli.run_config(["model=local", f"model.path={tmp_path}"]))


def test_plan_of_a_recipe_knows_what_the_megatron_learner_builds_of_it():
    config = cli.run_config(["learner=megatron", "rollout.max_completion_tokens=128"])
    assert verdict(plan_text(config)) == ["fits"]


def test_the_packages_folder_of_configs_is_the_checkouts() -> None:
    """A link, so that a wheel packs the files that a user edits."""
    root = Path(__file__).resolve().parents[3]
    assert cli.conf_dir().resolve() == root / "conf"
    assert cli.conf_dir().is_symlink()
