"""A study is read with every value checked, from its file and from the command line alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_dist.cli.compose import conf_dir, run_config
from gspo_dist.studies.study import Study, load_study

GOOD = {"arms": {"gspo": ["objective=gspo"], "grpo": []}, "reference": "grpo"}


def read_yaml(path: Path):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def load(tmp_path: Path, content: object, *args: str) -> Study:
    """The study of a file with this content."""
    path = tmp_path / "mine.yaml"
    path.touch()
    return load_study([f"study={path}", *args], conf_dir(), lambda _: content)


def test_study_options_and_refusals():
    args = ["study=gspo_vs_grpo", "study.seeds=[4,5]", "study.arms=[gspo,grpo_r2]", "steps=3"]
    study = load_study(args, conf_dir(), read_yaml)
    assert study.runs == [("gspo", 4), ("grpo_r2", 4), ("gspo", 5), ("grpo_r2", 5)]
    assert "steps=3" in study.run_overrides("gspo", 4)
    for args, message in (
        (["study=gspo_v_grpo"], "did you mean 'gspo_vs_grpo'"),
        (["study=gspo_vs_grpo", "study.arms=[gsp]"], "no arm 'gsp'; did you mean 'gspo'"),
        (["study=gspo_vs_grpo", "study.sedes=[1]"], "did you mean 'seeds'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_study(args, conf_dir(), read_yaml)


def test_the_two_staleness_studies_have_the_same_arms():
    """Each begins so many ticks ahead as its longest completion has tokens, and differs in nothing else."""
    short, long = (
        load_study([f"study={name}"], conf_dir(), read_yaml) for name in ("staleness", "staleness_long")
    )
    ticks = {
        name: tuple(override.replace("ticks_per_step=32", "ticks_per_step=320") for override in overrides)
        for name, overrides in short.arms.items()
    }
    assert long.arms == ticks
    assert (long.seeds, long.reference, len(long.arms)) == (short.seeds, short.reference, 25)
    assert "rollout.max_completion_tokens=320" in long.base


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seeds=a", r"study.seeds must be whole numbers: got 'a'; write \[0,1,2\]"),
        ("seeds=", "study.seeds must be whole numbers: got ''"),
        ("seeds=[0,1.5]", "study.seeds must be whole numbers"),
        ("seeds=[0,0]", "study.seeds must differ"),
        ("parallel=x", "study.parallel must be a whole number: got 'x'"),
        ("parallel=0", "study.parallel must be at least 1: got 0"),
        ("threads=-1", "study.threads must be at least 0: got -1"),
        ("retry_failed=yes", "study.retry_failed must be true or false: got 'yes'"),
        ("retry_failed=1", "study.retry_failed must be true or false: got '1'"),
        ("dir=", "study.dir must be a text: got ''"),
        ("reference=gsp", "study.reference must be an arm: got 'gsp'; did you mean 'gspo'"),
    ],
)
def test_a_value_that_its_key_cannot_have_is_refused_by_name(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, GOOD, f"study.{option}")


def test_booleans_and_spaces_are_read_as_meant(tmp_path):
    assert load(tmp_path, GOOD).retry_failed
    assert not load(tmp_path, GOOD, "study.retry_failed=False").retry_failed
    assert not load(tmp_path, GOOD | {"retry_failed": False}).retry_failed
    study = load(tmp_path, GOOD, "study.arms=[gspo, grpo]", "study.seeds=[ 0, 1 ]")
    assert (list(study.arms), study.seeds) == (["gspo", "grpo"], (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arms": ["gspo", "grpo"]},
            r"arms in study .*mine.yaml must map names to lists .* got \['gspo', 'grpo'\]",
        ),
        ({"arms": None}, "arms in study .* must map names"),
        (
            {"arms": {"gspo": "objective=gspo"}},
            "arm gspo of arms in study .* must be a list .* got 'objective=gspo'",
        ),
        ({"arms": {"gspo": None}}, "arm gspo of .* must be a list of overrides: got None"),
        ({"arms": {"gspo": [{"steps": 3}]}}, "arm gspo of .* must be a list of overrides"),
        ({"arms": {1: []}}, "arms in study .* must map names"),
        (
            {"base": "experiment=study"},
            "base in study .* must be a list of overrides: got 'experiment=study'",
        ),
        ({"seeds": [0, "a"]}, "seeds in study .* must be whole numbers"),
        ({"seeds": None}, "seeds in study .* must be whole numbers: got None"),
        ({"parallel": True}, "parallel in study .* must be a whole number: got True"),
        ({"retry_failed": "yes"}, "retry_failed in study .* must be true or false: got 'yes'"),
        ({"dir": None}, "dir in study .* must be a text"),
        ({"sedes": [0]}, r"unknown keys \['sedes'\]; known: seeds, arms"),
    ],
)
def test_a_study_file_is_refused_by_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, GOOD | change)


def test_a_study_file_is_a_mapping_that_names_its_reference(tmp_path):
    arms = {"arms": GOOD["arms"]}
    with pytest.raises(
        ValueError, match=r"has no reference; add the line reference: gspo, or give study\.reference"
    ):
        load(tmp_path, arms)
    assert load(tmp_path, arms, "study.reference=grpo").reference == "grpo"
    with pytest.raises(ValueError, match=r"must map keys to values: got \['gspo'\]"):
        load(tmp_path, ["gspo"])


def test_a_reference_that_is_asked_for_is_never_replaced(tmp_path):
    assert load(tmp_path, GOOD, "study.arms=[gspo]").reference == "gspo"  # the file's grpo does not run
    for options in (
        ("study.arms=[gspo]", "study.reference=grpo"),
        ("study.reference=grpo", "study.arms=[gspo]"),
    ):
        with pytest.raises(ValueError, match=r"study\.reference must be an arm: got 'grpo'"):
            load(tmp_path, GOOD, *options)


@pytest.mark.parametrize(
    "name", ["a, b", "a=b", "a~b", "it's", "a\\'b", "(a) [b] {c}:d", '"q"', "ü", "plain"]
)
def test_any_folder_reaches_the_run_as_it_is(name):
    study = Study(f"my {name}", (), {"gspo+r3": ()}, (0,), "gspo+r3", f"/runs/{name}")
    config = run_config(study.run_overrides("gspo+r3", 0))
    assert config.run_dir == str(study.run_dir("gspo+r3", 0)) == f"/runs/{name}/gspo+r3/seed-0"
    assert config.logger.wandb.tags == [f"my {name}", "gspo+r3"]
    assert config.logger.wandb.group == f"my {name}"


def test_a_plain_folder_needs_no_quotes():
    """Ended runs are known by their overrides: those that earlier versions quoted nothing of stay valid."""
    study = Study("s", (), {"gspo": ()}, (0,), "gspo", "runs/s_1.2-x")
    assert "run_dir=runs/s_1.2-x/gspo/seed-0" in study.run_overrides("gspo", 0)
    assert "logger.wandb.tags=[s,gspo]" in study.run_overrides("gspo", 0)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for study in (load(tmp_path, GOOD, "study.dir=~/runs"), load(tmp_path, GOOD | {"dir": "~/runs"})):
        assert study.run_dir("gspo", 0) == tmp_path / "runs/gspo/seed-0"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((conf_dir() / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arm_of_every_study_composes_to_equal_work_and_other_settings(path):
    study = load_study([f"study={path.stem}"], conf_dir(), read_yaml)
    configs = {arm: run_config(study.run_overrides(arm, study.seeds[0])) for arm in study.arms}
    assert (
        len({(c.steps, c.mini_batches, c.rollout.rollouts_per_step, c.seed) for c in configs.values()}) == 1
    )
    assert len({json.dumps(study.run_overrides(arm, 0)) for arm in study.arms}) == len(study.arms)
