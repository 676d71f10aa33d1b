"""The self-check finds what a learner would get wrong, names it, and lets right models pass."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.config import (
    DeepSpeedConfig,
    FlipsConfig,
    LearnerConfig,
    ModelConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
)
from gspo_dist.learners import own_process, self_check
from gspo_dist.learners.properties import TOLERANCE, Finding, check_architecture
from gspo_dist.learners.self_check import (
    SelfCheck,
    check_model_numerically,
    inspect,
    required,
)

SERVED = ["llama", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe"]


def written(family: str, **changes) -> dict:
    return json.loads(AutoConfig.for_model(family, **changes).to_json_string())


def findings(family: str, **changes) -> dict[str, Finding]:
    return {found.property: found for found in check_architecture(written(family, **changes))}


def nats(found: Finding) -> float:
    return float(found.measured.split("up to ")[1].split()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Qwen3-MoE as a folder, with weights and without a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def run(cache: Path, **sections) -> RunConfig:
    rollout = RolloutConfig(max_prompt_tokens=64, max_completion_tokens=64)
    return RunConfig(model=ModelConfig(cache_dir=str(cache)), rollout=rollout, **sections)


@pytest.mark.parametrize("family", SERVED)
def test_families_that_the_learner_serves_pass(family) -> None:
    found = findings(family, **({"sliding_window": None} if family == "mixtral" else {}))
    assert [f.property for f in found.values() if not f.passed] == []
    assert ("routes" in found) == ("moe" in family or family == "mixtral")
    assert nats(found["alone"]) <= TOLERANCE
    assert nats(found["packed"]) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "gemma"])
def test_rounding_stays_far_below_the_tolerance_where_the_head_is_the_embedding(family) -> None:
    """A wide embedding makes wide logits where it is the head, and rounding of 2e-5 nats."""
    found = findings(family, tie_word_embeddings=True)
    assert nats(found["alone"]) <= TOLERANCE / 10
    assert nats(found["packed"]) <= TOLERANCE / 10


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe", "jamba"])
def test_layers_with_memory_fail_packed_or_are_served_right(family) -> None:
    """Either the learner keeps sequences apart, and then to rounding, or the check says it does not."""
    found = findings(family)["packed"]
    assert found.passed == (nats(found) <= TOLERANCE)
    assert found.passed or nats(found) > 1e-3


@pytest.fixture
def leaky_attention(monkeypatch):
    """Packed attention that forgets the borders: every sequence sees those before it."""
    from gspo_dist.learners import attention

    def of(cu_seqlens, position_ids):
        total = int(cu_seqlens[-1])
        return attention.PackedLayout(torch.tensor([0, total]), total, torch.arange(total))

    monkeypatch.setattr(attention.PackedLayout, "of", staticmethod(of))


def test_a_sequence_that_sees_its_neighbour_is_found(leaky_attention) -> None:
    found = findings("llama")
    assert found["alone"].passed
    assert not found["packed"].passed
    assert nats(found["packed"]) > 1e-2


def test_a_head_that_forgets_the_scale_is_found(monkeypatch) -> None:
    """Granite divides its logits. A learner that does not is off by nats, and packing hides it."""
    import gspo_dist.learners.hf_model as hf_model

    whole = hf_model.taken_logprobs
    monkeypatch.setattr(
        hf_model,
        "taken_logprobs",
        lambda hidden, weight, ids, **rest: whole(hidden * 0.5, weight, ids, **rest),
    )
    found = findings("llama")
    assert not found["alone"].passed
    assert nats(found["alone"]) > 1e-2
    assert found["packed"].passed


def test_windows_that_the_packed_attention_does_not_have_are_found() -> None:
    found = findings("mistral", sliding_window=4096)["alone"]
    assert not found.passed
    assert "window 16 tokens" in found.measured
    assert findings("mistral", sliding_window=None)["alone"].passed


def test_routers_that_are_not_known_are_a_finding_and_not_an_end() -> None:
    found = findings("granitemoe")["routes"]
    assert found.passed or "known router" in found.measured


def test_a_replay_that_changes_nothing_is_found(monkeypatch) -> None:
    from gspo_dist.routing.replay import LayerReplay

    monkeypatch.setattr(LayerReplay, "choose", _ignoring(LayerReplay.choose))
    found = findings("qwen3_moe")["routes"]
    assert (found.passed, found.measured) == (False, "other experts, replayed, change no log-prob")


def _ignoring(choose):
    def native(self, native_ids):
        choose(self, native_ids)
        return native_ids

    return native


def test_an_architecture_that_cannot_be_built_small_is_a_finding() -> None:
    found = {f.property: f for f in check_architecture({"model_type": "none_such", "num_hidden_layers": 2})}
    assert set(found) == {"alone", "packed"}
    assert all(not f.passed and "it cannot be made or loaded" in f.measured for f in found.values())


def test_a_whole_folder_passes_every_property(folder) -> None:
    found = inspect(folder)
    assert [f.property for f in found.findings] == ["alone", "packed", "names", "routes"]
    assert found.failed(*self_check.PROPERTIES) == ()
    # 2 layers of 2 norms, 4 projections, 2 norms of heads, a router and 4 x 3 expert matrices; tables, norm
    assert {f.property: f.measured for f in found.findings}[
        "names"
    ] == f"{2 * (2 + 4 + 2 + 1 + 12) + 3} tensors"


def test_a_folder_with_another_name_or_a_missing_tensor_is_refused(folder, tmp_path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    renamed = {n.replace("layers.1.mlp.gate", "layers.1.mlp.router"): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    [found] = inspect(tmp_path).failed("names")
    assert "model.path lacks the weights ['model.layers.1.mlp.gate.weight']" in found.measured
    with pytest.raises(ValueError, match=r"fails the self-check 'names'.*copy the folder again"):
        check_model_numerically(tmp_path, run(tmp_path / "cache"))


def test_a_second_run_reads_what_the_first_one_found(folder, tmp_path, monkeypatch) -> None:
    first = check_model_numerically(folder, run(tmp_path))
    [kept] = (tmp_path / "self_check").iterdir()
    monkeypatch.setattr(self_check, "_check", lambda *args: pytest.fail("checked again"))
    assert check_model_numerically(folder, run(tmp_path)) == first
    kept.write_text("torn")
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        check_model_numerically(folder, run(tmp_path))


def test_another_config_is_checked_again(folder, tmp_path) -> None:
    check_model_numerically(folder, run(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    check_model_numerically(other, run(tmp_path))
    assert len(list((tmp_path / "self_check").iterdir())) == 2


def test_a_cache_that_cannot_be_written_stops_no_run(folder, tmp_path, caplog) -> None:
    (tmp_path / "self_check").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        check_model_numerically(folder, run(tmp_path))
    assert "is not kept" in caplog.text


def test_a_run_without_routes_is_told_and_one_with_them_refused(
    folder, tmp_path, monkeypatch, caplog
) -> None:
    bad = SelfCheck("dots1", (Finding("routes", False, "no known router"),), 0.1)
    monkeypatch.setattr(self_check, "_check", lambda *args: bad)
    with pytest.raises(
        ValueError, match=r"'routes'.*no known router; set objective.routing_replay=none and flips"
    ):
        check_model_numerically(folder, run(tmp_path))
    quiet = run(tmp_path, flips=FlipsConfig(every=0))
    with caplog.at_level(logging.WARNING):
        assert check_model_numerically(folder, quiet) == bad
    assert "does without routes" in caplog.text


@pytest.mark.parametrize(
    ("family", "noise"),
    [
        ("mixtral", {"sliding_window": None, "router_jitter_noise": 0.1}),
        ("phi", {"resid_pdrop": 0.1}),
        ("phimoe", {"router_jitter_noise": 0.1}),
    ],
)
def test_noise_of_the_training_mode_is_named_and_without_it_the_model_passes(family, noise) -> None:
    """A learner that trains with noise has log-probs that do not repeat, whatever packs or replays them."""
    found = findings(family, **noise)["alone"]
    assert not found.passed
    assert "draws random numbers in training (set its dropout and router noise to 0" in found.measured
    assert nats(found) > 1e-3
    assert findings(family, **{name: value and 0.0 for name, value in noise.items()})["alone"].passed


def test_attention_dropout_is_left_out_and_not_noise() -> None:
    assert findings("qwen2", attention_dropout=0.5)["alone"].passed


def as_megatron(cache: Path) -> RunConfig:
    return run(cache, learner=LearnerConfig(backend="megatron"))


def test_a_run_of_the_megatron_learner_is_refused_for_what_megatron_gets_wrong(
    folder, tmp_path, monkeypatch
) -> None:
    """Its findings are its own, kept beside those of the other learners, and asked for once."""
    asked = []
    wrong = [Finding("alone", False, "log-probs differ by up to 1.0e+00 nats"), Finding("names", True, "")]
    monkeypatch.setattr(own_process, "ask", lambda *question: asked.append(question) or wrong)
    assert check_model_numerically(folder, run(tmp_path)).failed("alone") == ()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"fails the self-check 'alone'.*up to 1\.0e\+00 nats"):
            check_model_numerically(folder, as_megatron(tmp_path))
    assert [(module, config["model_type"], path) for module, config, path in asked] == [
        ("gspo_dist.learners.megatron.self_check", "qwen3_moe", folder)
    ]
    assert len(list((tmp_path / "self_check").iterdir())) == 2


def test_a_run_asks_the_learner_that_it_has(folder, tmp_path, monkeypatch) -> None:
    """ZeRO 3 builds a model of its own and is asked in its own process; the other stages load eager's."""
    asked = []
    passes = [Finding(name, True, "") for name in self_check.PROPERTIES]
    monkeypatch.setattr(own_process, "ask", lambda module, *rest: asked.append(module) or passes)
    for stage in range(4):
        deepspeed = LearnerConfig(backend="deepspeed", deepspeed=DeepSpeedConfig(zero_stage=stage))
        check_model_numerically(folder, run(tmp_path, learner=deepspeed))
    assert asked == ["gspo_dist.learners.deepspeed.self_check"]
    check_model_numerically(folder, run(tmp_path))
    assert len(list((tmp_path / "self_check").iterdir())) == 2


def test_a_check_that_cannot_run_is_said_and_made_again_the_next_time(
    folder, tmp_path, monkeypatch, caplog
) -> None:
    def dies(*question):
        raise RuntimeError("it ended with 134: Fatal: no such kernel")

    monkeypatch.setattr(own_process, "ask", dies)
    with caplog.at_level(logging.WARNING):
        found = check_model_numerically(folder, as_megatron(tmp_path))
    assert [f.property for f in found.findings] == ["names"]
    assert "megatron's process: it ended with 134" in caplog.text
    assert not (tmp_path / "self_check").exists()


def test_a_run_needs_what_it_uses() -> None:
    base = RunConfig()
    assert required(base) == ("alone", "packed", "names", "routes")
    assert required(replace(base, flips=FlipsConfig(every=0))) == ("alone", "packed", "names")
    replayed = ObjectiveConfig(routing_replay="r3")
    assert required(replace(base, flips=FlipsConfig(every=0), objective=replayed))[-1] == "routes"
    assert required(replace(base, learner=LearnerConfig(backend="megatron"))) == required(base)


def test_scales_and_memory_are_checked_as_a_run_loads_them() -> None:
    """Granite divides its logits by 8; the loader tells the head, and the check goes through the loader."""
    found = findings("granite", logits_scaling=8.0)
    assert found["alone"].passed
    assert found["packed"].passed


def test_the_trainer_checks_before_it_starts_unless_told_not_to(folder, tmp_path, monkeypatch) -> None:
    from gspo_dist.trainer.setup import checks

    bad = SelfCheck("dots1", (Finding("alone", False, "log-probs differ by up to 1.0e+00 nats"),), 0.1)
    monkeypatch.setattr(self_check, "_check", lambda *args: bad)
    (folder / "tokenizer.json").touch()
    config = run(tmp_path)
    with pytest.raises(ValueError, match=r"fails the self-check 'alone'.*model.self_check=false"):
        checks.check_model(config, str(folder))
    assert (
        checks.check_model(replace(config, model=replace(config.model, self_check=False)), str(folder)) == 2
    )
