"""A plan is read from the run's own configuration, and refuses what the run refuses, in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.cli.plan import calibrated, main, plan_text, planned, planned_model, search_text
from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import to_mapping
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_knobs, check_layout
from gspo_dist.models.config_file import BUILT_IN

LARGE = ["experiment=qwen3_30b_a3b/gspo", "layout=qwen3_30b_a3b_2x8"]


def verdict(text: str) -> list[str]:
    """The lines of a plan's text from its verdict on."""
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line in ("fits", "does not fit")) :]


def refused_by_the_run(config: RunConfig) -> str:
    """What the learner's own checks say of a configuration; fails where they accept it."""
    try:
        check_knobs(config.learner, gpu=True)
        check_layout(config.learner.megatron, from_hf(BUILT_IN["Qwen3-30B-A3B"]), config.learner.world_size)
    except ValueError as error:
        return str(error)
    raise AssertionError("the run accepts it")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.megatron.sequence_parallel=false"],
        [
            "learner.megatron.token_dispatcher=allgather",
            "learner.megatron.pipeline_parallel=2",
            "learner.megatron.expert_parallel=2",
        ],
        ["learner.megatron.expert_parallel=6", "learner.world_size=12"],
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
    config = run_config([*LARGE, *overrides])
    refusal = refused_by_the_run(config)
    assert verdict(plan_text(config)) == ["does not fit", f"  {refusal}"]
    assert verdict(plan_text(run_config(LARGE))) == ["fits"]


def test_plan_refuses_a_model_that_the_megatron_learner_does_not_build():
    said = verdict(plan_text(run_config([*LARGE, "plan.model=OLMoE-1B-7B"])))
    assert said[0] == "does not fit"
    assert "does not know the architecture 'OlmoeForCausalLM'" in said[1]
    assert "use learner=deepspeed" in said[1]


def test_plan_refuses_an_engine_that_does_not_divide_the_heads():
    said = verdict(plan_text(run_config([*LARGE, "rollout.tensor_parallel=3"])))
    assert said[:2] == [
        "does not fit",
        "  rollout.tensor_parallel must divide num_attention_heads: got 3 and 32; try 1, 2, 4, 8, 16, 32",
    ]


@pytest.mark.slow
def test_plan_counts_the_gpus_of_a_node_by_the_gpu_unless_told():
    for given, nodes in (
        ([], "2 x 8 H100-80GB"),
        (["plan.gpu=GB200"], "2 x 4 GB200-186GB"),
        (["plan.gpu=GB200", "plan.gpus_per_node=8"], "2 x 8 GB200-186GB"),
        (["plan.gpus_per_node=2"], "2 x 2 H100-80GB"),
        (["plan.nodes=3"], "3 x 8 H100-80GB"),
    ):
        assert f"\non {nodes}\n" in plan_text(run_config([*LARGE, *given]))


def test_the_model_to_plan_is_the_named_one_then_the_runs_own_then_the_fallback_then_the_recipe(
    tmp_path: Path,
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    own, fallback = f"model.path={tmp_path}", "plan.fallback_model=Qwen3-30B-A3B"

    def planned(*overrides: str) -> str:
        return planned_model(run_config(list(overrides)))[1]

    assert planned("model=local", own, fallback, "plan.model=OLMoE-1B-7B") == "OLMoE-1B-7B"
    assert planned("model=local", own, fallback) == tmp_path.name
    assert planned("model=local", "model.path=/not/here", fallback) == "Qwen3-30B-A3B"
    assert planned("model=peer") == "peer"
    with pytest.raises(ValueError, match=r"/not/here has no config\.json; give plan\.model=Qwen3-30B-A3B"):
        planned("model=local", "model.path=/not/here")


def test_plan_names_the_size_that_a_config_leaves_out(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=f"config.json of {tmp_path.name} must give hidden_size"):
        plan_text(run_config(["model=local", f"model.path={tmp_path}"]))


def test_plan_of_a_recipe_knows_what_the_megatron_learner_builds_of_it():
    config = run_config(["learner=megatron", "rollout.max_completion_tokens=128"])
    assert verdict(plan_text(config)) == ["fits"]


def test_a_plan_takes_lengths_from_a_runs_samples(tmp_path):
    rows = [{"step": 1, "tokens": n} for n in (100, 200, 400, 800)] + [{"step": 2}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = plan_text(run_config([*LARGE, f"plan.lengths_from={tmp_path}"]))
    assert "lengths lognormal, mean 375, spread 0.775" in text  # log 2 times the deviation of 0, 1, 2, 3
    with pytest.raises(ValueError, match=r"needs a run folder with sampled completions: .*elsewhere"):
        plan_text(run_config([*LARGE, f"plan.lengths_from={tmp_path / 'elsewhere'}"]))


def test_lengths_memory_and_network_are_knobs(tmp_path):
    """Each one given moves what it stands for: mean and spread, the host's memory, the publication."""
    text = plan_text(run_config([*LARGE, "plan.length_mean=1000", "plan.prompt_mean=300"]))
    assert "mean 1,000, spread 0.8" in text
    small = plan_text(run_config([*LARGE, "plan.host_gib=100"]))
    assert verdict(small)[0] == "does not fit"
    assert "and has 100.0 GiB" in small
    # 2 x 30.5 GB at 0.4 of 5 GB/s, and 0.1 ms for each of 18,867 tensors
    assert "weight sync 32," in plan_text(run_config([*LARGE, "plan.network_gb_s=5"]))
    (tmp_path / "mine.jsonl").write_text('{"tokens": 500}\n')
    text = plan_text(run_config([*LARGE, f"plan.lengths_from={tmp_path / 'mine.jsonl'}"]))
    assert "lengths lognormal, mean 500, spread 0" in text


def run_folder(folder: Path, *overrides: str) -> Path:
    """A folder as a run leaves it, of four steps of 400 s of sampling and 540 s of learning."""
    row = {"time/update_s": 540.0, "time/old_logprobs_s": 0.0, "time/collect_s": 400.0}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_mapping(run_config([*LARGE, *overrides]))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    return folder


def test_calibrate_measures_speeds_on_a_run_and_plans_with_them(tmp_path, capsys):
    own = planned(run_config(LARGE)).step
    folder = run_folder(tmp_path / "run")
    config, said = calibrated(run_config(LARGE), str(folder))
    assert config.plan.learner_speed == pytest.approx(own.train_s / 540, rel=1e-6)
    assert config.plan.engine_speed == pytest.approx(own.collect_s / 400, rel=1e-6)
    assert f"plan.learner_speed={own.train_s / 540:.3g} plan.engine_speed={own.collect_s / 400:.3g}" in said
    step = planned(config).step
    assert step.train_s == pytest.approx(540, rel=1e-6)
    assert step.collect_s == pytest.approx(400, rel=1e-6)
    main([*LARGE, f"--calibrate={folder}"])
    assert capsys.readouterr().out.startswith(said)


def test_calibrate_says_what_it_cannot_measure(tmp_path):
    with pytest.raises(ValueError, match=r"needs a run folder: .*nowhere has no config\.json"):
        calibrated(run_config(LARGE), str(tmp_path / "nowhere"))
    folder = run_folder(tmp_path / "ahead", "rollout.steps_ahead=1")
    config, said = calibrated(run_config(LARGE), str(folder))
    assert config.plan.engine_speed == 1.0
    assert "not measured: it overlaps" in said
    cpu = run_folder(tmp_path / "cpu", "plan.gpu=null")
    with pytest.raises(ValueError, match=r"give plan\.gpu=H100"):
        calibrated(run_config([*LARGE, "plan.gpu=null"]), str(cpu))


def test_a_search_is_a_table_of_layouts_that_can_be_typed_in(capsys):
    short = ["rollout.prompts_per_step=64", "rollout.group_size=4"]
    main([*LARGE, *short, "--search=0"])
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if "learner.world_size=" in line).split()[1:]
    assert "rollout.steps_ahead=0" in first
    assert verdict(plan_text(run_config([*LARGE, *short, *first]))) == ["fits"]
    with pytest.raises(ValueError, match="--search takes a number of steps ahead: got 'far'"):
        search_text(run_config(LARGE), "far")
    with pytest.raises(ValueError, match=r"give plan\.gpu=H100"):
        search_text(run_config([*LARGE, "plan.gpu=null"]), "")


@pytest.mark.slow
def test_the_assumed_spread_is_a_knob():
    text = plan_text(run_config([*LARGE, "plan.length_spread=0.25"]))
    assert "spread 0.25," in text
    with pytest.raises(ValueError, match=r"plan\.length_spread must be at least 0"):
        run_config([*LARGE, "plan.length_spread=-1"])
