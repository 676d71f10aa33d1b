"""The table of logged keys: what it says of a key, its page, and whether it is what runs log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.metrics.names import metric_of, metrics, page
from gspo_dist.metrics.table import PLACEHOLDERS, SECTIONS
from tests.unit.trainer.small import go

PACKAGE = Path(__file__).resolve().parents[3] / "gspo_dist"


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("objective/loss", "objective/loss"),
        ("objective/mini_batch_12/clip_fraction", "objective/mini_batch_{index}/clip_fraction"),
        ("routing/update/flip_fraction/layer_07", "routing/update/flip_fraction/layer_{layer}"),
        ("routing/update/flip_fraction", "routing/update/flip_fraction"),
        ("objective/sequence_ratio/q99", "objective/sequence_ratio/q{percent}"),
        ("eval/aime24/avg@32", "eval/{suite}/avg@{k}"),
        ("eval/aime24/avg@32_standard_error", "eval/{suite}/avg@{k}_standard_error"),
        ("reward/timeout_fraction", "reward/timeout_fraction"),
        ("reward/answered", "reward/{part}"),
        ("objective/mini_batch_x/clip_fraction", None),
        ("objective/losses", None),
        ("xobjective/loss", None),
    ],
)
def test_a_key_is_its_own_entry_or_the_one_whose_placeholders_it_fills(key, entry):
    found = metric_of(key)
    assert (found.key if found else None) == entry


def test_the_readme_is_the_rendered_table():
    assert (PACKAGE / "metrics" / "README.md").read_text(encoding="utf-8") == page(), (
        "run python -m gspo_dist.metrics.names > gspo_dist/metrics/README.md"
    )


def test_every_entry_is_whole_and_there_once():
    keys = [metric.key for metric in metrics()]
    assert len(set(keys)) == len(keys)
    for metric in metrics():
        assert metric.unit, metric.key
        assert metric.meaning.endswith("."), metric.key
        assert set(re.findall(r"\{(\w+)\}", metric.key)) <= set(PLACEHOLDERS)
        assert (
            "|" not in metric.key + metric.unit + metric.meaning + metric.when
        )  # it would end a table's cell
    for section in SECTIONS:
        assert (PACKAGE / section.source).is_file(), section.source


@pytest.mark.parametrize("metric", list(metrics()), ids=lambda metric: metric.key)
def test_an_entry_finds_itself(metric):
    """No entry is shadowed by an earlier one: its example is looked up as itself."""
    example = {
        "index": "3",
        "layer": "07",
        "lag": "4",
        "k": "4",
        "percent": "99",
        "suite": "aime24",
        "part": "format",
        "engine": "engine-1",
    }
    assert metric_of(metric.key.format(**example)) is metric


def test_a_unit_that_ends_a_name_is_the_unit_of_the_entry():
    """`namespace/name` with the unit last: a name that ends in _s is in seconds, and so on."""
    endings = {
        "_tokens_per_s": "tokens per second",
        "_gib_per_s": "GiB per second",
        "_s": "seconds",
        "_bytes": "bytes",
        "_fraction": "share",
        "_tokens": "tokens",
        "_clip_widths": "clip widths",
    }
    for metric in metrics():
        name = metric.key.rsplit("/", 1)[-1]
        unit = next((unit for ending, unit in endings.items() if f"_{name}".endswith(ending)), None)
        assert unit is None or metric.unit == unit, metric.key


# -- against runs --

REWARD = """
PARTS = {"format": 1.0, "timeout": 0.0, "crash": 0.0, "error": 0.0}


def parts(prompt, completion):
    return completion.text.count("7") / max(1, len(completion)), PARTS
"""
GAME = """
import os


class Game:
    def reset(self, prompt, seed):
        self.dies = seed % 2

    def step(self, turn):
        if self.dies:
            os._exit(1)
        return "?"
"""
CONFIGURATIONS = {
    "gspo": ["objective=gspo"],
    "subset": [
        "objective=gspo",
        "objective.guard.action=recentre",
        "objective.guard.estimator=subset",
        "objective.guard.threshold=0",
        "objective.guard.subset_fraction=0.5",
    ],
    "r2": ["objective=grpo_r2", "objective.kl_coef=0.1"],
    "r3": ["objective=grpo_r3", "evaluation.samples=3"],
    "ahead": [
        *("objective=gspo", "objective.staleness.clip_spreads=1", "steps=2"),
        *("rollout.steps_ahead=1", "rollout.ticks_per_step=8"),
    ],
    "correction": ["objective=grpo", "objective.correction.name=token_truncate"],
    "dapo": [
        *("objective=dapo", "objective.selection.over_asked=1", "objective.selection.mask_truncated=false"),
        *("++data.options.size=40", "data.renewal={active: 12, arrivals: 1.5, retire_at: 0.5}"),
        "rollout.length_schedule=[[1, 4]]",
    ],
    "rspo": ["objective=rspo", "objective.selection.degenerate=drop"],
    "score_centering": ["objective=score_centering"],
    "fp16": ["objective=gspo", "learner.precision=fp16"],
    "turns": [
        *("environment.factory='FOLDER/game.py:Game'", "environment.max_turns=2"),
        *("environment.stop=[0,1,2,3,4,5,6,7,8,9,a,b,c,d,e,f,g,h]", "environment.failure_reward=0"),
    ],
    "suites": [
        "evaluation.suites=[own]",
        "+evaluation.options.own={file: FOLDER/own.jsonl, reward: exact_match, samples: 1}",
    ],
}
NOT_BY_THESE_RUNS = {"learners/megatron/balance.py", "metrics/sinks.py", "trainer/sharing.py"}
"""Sources of keys that only a Megatron learner logs (tests/parity compares its metrics), only a collect that
takes long (test_pipeline.py), or only shared GPUs (test_colocation.py)."""
NOT_BY_THESE_SUITES = ("eval/{suite}/elo",)
"""Beginnings of keys that need stored standings of contests (test_codeforces.py)."""


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """Configuration -> keys of a real run: the eager learner and the reference engine in this process."""
    folder = tmp_path_factory.mktemp("runs")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    (folder / "mine.py").write_text(REWARD)
    (folder / "game.py").write_text(GAME)
    (folder / "own.jsonl").write_text('{"problem": "1+2=", "answer": "3"}\n')
    keys = {}
    for name, overrides in CONFIGURATIONS.items():
        common = [
            *("cluster=in_process", "learner=eager", "rollout=reference", "logger=quiet"),
            *("model=local", f"model.path={folder / 'model'}", f"run_dir={folder / name}"),
            *("reward=function", f"reward.function='{folder / 'mine.py'}:parts'"),
            *("steps=1", "mini_batches=2", "flips.every=1", "checkpoint.save_last=false"),
            *("rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_prompt_tokens=16"),
            *("rollout.max_completion_tokens=4", "learner.token_budget=128", "evaluation.prompts=2"),
            *("learner.precision=fp32", "rollout.precision=fp32", "rollout.weight_sync.probe_every=1"),
        ]
        go(run_config([*common, *(one.replace("FOLDER", str(folder)) for one in overrides)]))
        keys[name] = {key for row in read_jsonl(folder / name / "metrics.jsonl") for key in row}
    return keys


@pytest.mark.slow
def test_runs_log_no_key_without_an_entry(logged):
    assert {name: [key for key in keys if metric_of(key) is None] for name, keys in logged.items()} == {
        name: [] for name in CONFIGURATIONS
    }


@pytest.mark.slow
def test_every_entry_is_logged_by_some_run(logged):
    """But for what only Megatron logs, no entry is dead."""
    seen = {metric_of(key) for keys in logged.values() for key in keys}
    entries = {m for section in SECTIONS if section.source not in NOT_BY_THESE_RUNS for m in section.metrics}
    dead = [metric.key for metric in entries - seen]
    assert [key for key in dead if not key.startswith(NOT_BY_THESE_SUITES)] == []


@pytest.mark.slow
def test_an_entry_for_every_step_is_in_every_run(logged):
    always = [metric for metric in metrics() if not metric.when]
    for name, keys in logged.items():
        found = {metric_of(key) for key in keys}
        assert [metric.key for metric in always if metric not in found] == [], name


@pytest.mark.slow
def test_entries_with_a_condition_are_not_in_every_run(logged):
    """Where the condition is the run's own setting: replay, a KL term, a correction."""
    for metric, runs in (
        ("routing/replay_bytes", {"r2", "r3"}),
        ("objective/kl_loss", {"r2"}),
        ("objective/correction_weight_mean", {"correction"}),
    ):
        assert {name for name, keys in logged.items() if metric in keys} == runs
