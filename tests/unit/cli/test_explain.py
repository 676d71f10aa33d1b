"""What is wrong with an override is said with the override, the rule, and how to write it instead."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gspo_dist.cli.compose import compose
from gspo_dist.cli.explain import check_overrides, config_groups, group_options, quoted


@pytest.mark.parametrize(
    "value",
    [
        "/a=b.jsonl",
        "/a,b.jsonl",
        "Don't",
        'say "yes"',
        "a#b",
        "a & b",
        "~/x.jsonl",
        "(a).jsonl",
        "x[0]",
        "a b",
        "ends in a \\",
        'a \\" b',
        "{a}",
    ],
)
def test_the_override_that_a_message_offers_gives_the_text_that_was_meant(value):
    """As a shell and hydra read it; the value itself is refused, or is what it is."""
    words = shlex.split(quoted("data.system_prompt", value))
    assert compose(words)["data"]["system_prompt"] == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train=/a=b.jsonl",
            r"cannot read the override 'data.train=/a=b.jsonl': a value with = needs quotes; write ",
        ),
        ("data.system_prompt=Don't", r"a value with ' needs quotes; write "),
        ("data.train=~/x.jsonl", r"a value with ~ needs quotes; write 'data.train=\"~/x.jsonl\"'"),
        (
            "data.train=/a,b.jsonl",
            r"names several values: write 'data.train=\"/a,b.jsonl\"' if it is one text, data.train=",
        ),
        ("steps=range(1,3)", r"names several values: .* or add --multirun for a run of each"),
        ("checkpoint.accept=[reward", r"a list has the form \[a,b\] and a mapping \{key: value\}"),
        ("steps", r"the form key=value: got 'steps'"),
        ("=3", r"the form key=value: got no key in '=3'"),
        ("lerner=eager", r"unknown config key 'lerner'. did you mean 'learner'\?"),
        ("learner.optimizer.rl=1", r"unknown config key .* did you mean 'learner.optimizer.lr'\?"),
        ("+learner.foo=1", r"unknown config key 'learner.foo'. learner has backend, world_size, "),
        ("zzz=1", r"unknown config key 'zzz'. gspo train --cfg job prints the known ones"),
        ("study=contract", r"study belongs to `gspo compare`: got 'study=contract'"),
        ("learner=", r"learner= is none of its options: known: deepspeed, eager, megatron"),
        ("experiment=qwen3_30b_a3b/gsop", r"did you mean 'qwen3_30b_a3b/gspo'\?"),
        ("rollout.group_size=abc", r"rollout.group_size must be a whole number: got 'abc'"),
        ("learner.fp32_head=maybe", r"learner.fp32_head must be true or false: got 'maybe'"),
        ("learner.optimizer.lr=fast", r"learner.optimizer.lr must be a number: got 'fast'"),
        ("checkpoint.accept=reward", r"checkpoint.accept must be a list: got 'reward'"),
        (
            "learner.optimizer=3",
            r"learner.optimizer must be a section, whose knobs are set one by one: got '3'",
        ),
        (
            "objective.params.strength=1",
            r"use \+objective.params.strength=1 \(Key 'strength' is not in struct\)$",
        ),
        ("+steps=3", r"Either remove \+ prefix: 'steps=3'"),
        ("data.train=${nope}", r"^data.train: Interpolation key 'nope' not found$"),
    ],
)
def test_a_bad_override_is_named_with_its_way_out(override, message):
    with pytest.raises(ValueError, match=message):
        compose([override])


@pytest.mark.parametrize(
    "overrides",
    [
        ["+objective.params.strength=1"],
        ["data.options={size: 3}"],
        ["hydra.verbose=true"],
        ["objective@objective=grpo"],
        ["~logger"],
        ["layout=qwen3_30b_a3b_4x8", "learner=megatron"],
    ],
)
def test_what_hydra_accepts_is_let_through(overrides):
    check_overrides(overrides)


def test_several_values_are_let_through_for_a_sweep():
    check_overrides(["steps=1,2"], sweep=True)


HEAD = b"# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEAD + b"steps: many\n",
            r"experiment/mine.yaml: steps must be a whole number: got 'many'",
        ),
        (
            HEAD + b"learner:\n  optimiser:\n    lr: 3\n",
            r"mine.yaml: unknown config key 'learner.optimiser'. did you mean 'learner.optimizer'\?",
        ),
        (
            HEAD + b"steps: [1\n",
            r'must be YAML: .* in ".*/mine.yaml", line 2, column 8',
        ),
        (
            HEAD + b"run_dir: gr\xf6sse\n",
            r"must be UTF-8: .*/mine.yaml \('utf-8'",
        ),
        (
            HEAD + b"defaults:\n  - override /learner: mega\n",
            r"learner=mega is none of its options",
        ),
        (
            HEAD + b"defaults:\n  - override /lerner: eager\n",
            r"experiment/mine.yaml: a run has no group 'lerner'; did you mean 'learner'\?",
        ),
        (b"steps: 3\n", r"experiment/mine.yaml: the first line .* must be: # @package _global_"),
    ],
)
def test_a_bad_file_of_the_users_own_is_named(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        compose(["experiment=mine"], [tmp_path])


def test_the_options_of_the_users_own_folder_are_offered_too(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\n")
    with pytest.raises(ValueError, match="experiment=mein is none of its options: did you mean 'mine'"):
        compose(["experiment=mein"], [tmp_path])
    with pytest.raises(ValueError, match=r"--config-dir must be a folder of configurations: got .*nope"):
        compose(["experiment=mine"], [tmp_path / "nope"])


def test_groups_and_options_are_the_folders_of_conf():
    assert config_groups() == [
        *(
            "model",
            "learner",
            "rollout",
            "objective",
            "data",
            "reward",
            "cluster",
            "logger",
            "layout",
            "experiment",
        )
    ]
    assert group_options("learner") == ["deepspeed", "eager", "megatron"]
    assert "qwen3_30b_a3b/gspo" in group_options("experiment")
