"""From names to classes, and what each process is told."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.learners.eager import EagerLearner
from gspo_dist.models.shape import read_shape
from gspo_dist.rollout.engine import EngineInfo
from gspo_dist.trainer.setup.factories import (
    begins_equal,
    cap_threads,
    engine_factory,
    engine_precision,
    learner_factory,
    make_learner,
    make_objective,
    make_sinks,
    probe_tolerance,
    records_routing,
    resolved_weight_sync,
    sampling_spec,
    stored_weights,
)
from gspo_dist.weights.tolerance import LEVELS
from tests.unit.trainer.small import config

TOKENIZER = SimpleNamespace(eos_token_id=7)


def info(**changes) -> EngineInfo:
    known = {
        "name": "engine-0",
        "device": "cpu",
        "max_model_len": 24,
        "vocab_size": 64,
        "num_experts": 8,
        "moe_layers": 2,
        "top_k": 2,
        "can_record_routing": True,
        "workers": 1,
        "gives_candidates": True,
    }
    return EngineInfo(**(known | changes))


def test_the_schedule_spans_all_optimiser_steps(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "steps=5", "mini_batches=2", "objective.kl_coef=0.1")
    told = learner_factory(c, str(model), "cpu").keywords
    assert told["total_steps"] == 10
    assert told["keep_reference"] is True
    assert (
        learner_factory(config(model, reward_file, tmp_path), "m", "cpu").keywords["keep_reference"] is False
    )


def test_a_rank_is_told_what_the_run_says(model, reward_file, tmp_path):
    knobs = ("steps=5", "mini_batches=4", "rollout.temperature=0.7", "objective.kl_coef=0.1")
    c = config(model, reward_file, tmp_path, *knobs)
    made = learner_factory(c, "folder", "cuda")
    assert (made.func, made.args) == (make_learner, (c.learner, "folder"))
    assert made.keywords == {
        "total_steps": 20,
        "temperature": 0.7,
        "keep_reference": True,
        "device": "cuda",
    }


@pytest.mark.parametrize(("device", "expected"), [("cpu", 3), ("cuda", 2)])
def test_threads_are_capped_where_several_processes_share_the_cores(device, expected):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cap_threads(3, device)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_group_of_one_needs_an_objective_without_a_baseline(model, reward_file, tmp_path):
    """A user's own objective brings its estimator, so the configuration cannot see this."""
    c = config(model, reward_file, tmp_path, "objective=grpo")
    two = replace(c.rollout, group_size=2)
    one = replace(two)
    object.__setattr__(one, "group_size", 1)
    assert make_objective(replace(c, rollout=two)).spec.advantage == "group_std"
    alone = SimpleNamespace(objective=c.objective, rollout=one)
    with pytest.raises(ValueError, match=r"at least 2 for group_std advantages .*: got 1; raise it"):
        make_objective(alone)
    alone.objective = replace(c.objective, advantage="none")
    assert make_objective(alone).spec.advantage == "none"


def test_a_clip_that_never_binds_is_made_where_it_is_insisted_on(model, reward_file, tmp_path):
    wide = ["objective=gspo", "objective.params.clip_high=0.2"]
    insisted = config(model, reward_file, tmp_path, *wide, "objective.allow_wide_clip=true")
    assert make_objective(insisted).resolved["clip_high"] == 0.2
    object.__setattr__(insisted, "objective", replace(insisted.objective))
    object.__setattr__(insisted.objective, "allow_wide_clip", False)
    with pytest.raises(ValueError, match="allow_wide_clip=true to insist"):
        make_objective(insisted)


def test_the_eager_learner_is_built_with_its_share_of_threads(model, reward_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    learner = learner_factory(config(model, reward_file, tmp_path), str(model), "cpu")()
    assert isinstance(learner, EagerLearner)
    assert torch.get_num_threads() == 1
    learner.close()


@pytest.mark.parametrize(
    ("extra", "moe_layers", "records"),
    [
        (["flips.every=1"], 1, True),
        (["flips.every=2"], 2, True),
        (["flips.every=1"], 0, False),
        (["flips.every=0"], 2, False),
        (["flips.every=0", "objective=grpo_r3"], 2, True),
        (["flips.every=0", "objective=grpo_r2"], 2, False),
    ],
)
def test_engines_record_where_r3_or_the_flip_metric_needs_it(
    model, reward_file, tmp_path, extra, moe_layers, records
):
    c = config(model, reward_file, tmp_path, *extra)
    assert records_routing(c, moe_layers) is records
    assert engine_factory(c, str(model), "cpu", moe_layers).keywords["record_routing"] is records


def test_the_reference_engine_is_told_who_it_is(model, reward_file, tmp_path):
    engine = engine_factory(config(model, reward_file, tmp_path), str(model), "cpu", 2)(name="engine-7")
    facts = engine.info()
    assert (facts.name, facts.device, facts.can_record_routing) == ("engine-7", "cpu", True)
    engine.close()


def test_the_reference_engine_stays_on_the_cpu(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    assert engine_factory(c, str(model), "cuda", 2).keywords["device"] == "cpu"


@pytest.mark.parametrize(
    ("knobs", "fp32_head"),
    [
        (["learner.precision=bf16"], True),
        (["learner.precision=bf16", "learner.fp32_head=false"], False),
        (["learner.precision=fp32", "learner.fp32_head=false"], True),
    ],
)
def test_engines_and_learner_have_heads_of_one_precision(
    model, reward_file, tmp_path, knobs, fp32_head, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        "gspo_dist.rollout.vllm.engine.VllmEngine", lambda *args, **told: seen.append(told["fp32_head"])
    )
    c = config(model, reward_file, tmp_path, "rollout=vllm", "rollout.precision=bf16", *knobs)
    engine_factory(c, str(model), "cpu", 2)(name="engine-0")
    assert seen == [fp32_head]


@pytest.mark.parametrize(
    ("engine", "learner", "rollout", "levels", "equal"),
    [
        ("vllm", "bf16", "bf16", "bf16", True),
        ("vllm", "fp32", "fp32", "fp32", True),
        ("vllm", "fp32", "bf16", "bf16", True),
        ("vllm", "bf16", "fp32", "bf16", False),  # the engine may have read what bf16 cannot hold
        ("vllm", "fp16", "fp16", "fp16", True),
        ("vllm", "fp32", "fp16", "fp16", True),
        ("vllm", "fp16", "fp32", "fp16", False),
        ("reference", "bf16", "bf16", "bf16", False),  # it computes in fp32 whatever is asked for
        ("reference", "fp32", "bf16", "fp32", True),
    ],
)
def test_the_probe_follows_the_coarser_precision(
    model, reward_file, tmp_path, engine, learner, rollout, levels, equal
):
    knobs = [f"rollout={engine}", f"learner.precision={learner}", f"rollout.precision={rollout}"]
    c = config(model, reward_file, tmp_path, *knobs, "rollout.weight_sync.probe_tolerance=null")
    assert probe_tolerance(c).levels == LEVELS[levels]
    assert probe_tolerance(c).fixed is None
    assert begins_equal(c) is equal
    assert engine_precision(c) == ("fp32" if engine == "reference" else rollout)
    plain = config(model, reward_file, tmp_path)
    assert probe_tolerance(plain).fixed == 1e-4
    object.__setattr__(plain, "learner", replace(plain.learner, consistency="exact"))
    assert probe_tolerance(plain).fixed == 0.0


def test_how_a_run_samples(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "rollout.temperature=0.7", "seed=9")
    spec = sampling_spec(c, TOKENIZER, info())
    assert (spec.n, spec.max_tokens, spec.temperature, spec.seed) == (4, 8, 0.7, 9)
    assert spec.stop_token_ids == (7,)
    assert spec.record_routing
    assert not sampling_spec(c, TOKENIZER, info(can_record_routing=False)).record_routing
    assert sampling_spec(c, SimpleNamespace(eos_token_id=None), info()).stop_token_ids == ()
    assert not sampling_spec(
        config(model, reward_file, tmp_path, "flips.every=0"), TOKENIZER, info()
    ).record_routing
    dense = info(moe_layers=0, num_experts=0, top_k=0)
    assert not sampling_spec(c, TOKENIZER, dense).record_routing


def test_completions_end_with_the_texts_of_the_environment_too(model, reward_file, tmp_path):
    """The configuration refuses a nucleus for training; whoever allows it finds it in what is sampled."""

    class Words:
        eos_token_id = 7

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [len(text)]}

    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "environment", replace(c.environment, stop=("ab", "abc")))
    object.__setattr__(c.rollout, "top_p", 0.9)
    spec = sampling_spec(c, Words(), info())
    assert (spec.stop_token_ids, spec.top_p) == ((7, 2, 3), 0.9)


def test_r3_is_refused_on_an_engine_that_cannot_record(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "objective=grpo_r3")
    with pytest.raises(
        ValueError, match=r"routing_replay=r3 needs an engine that records .*: engine-0 cannot"
    ):
        sampling_spec(c, TOKENIZER, info(can_record_routing=False))


def test_likeliest_tokens_are_asked_of_an_engine_that_gives_them(model, reward_file, tmp_path):
    centred = config(model, reward_file, tmp_path, "objective=score_centering")
    assert sampling_spec(centred, TOKENIZER, info()).candidates == 32
    with pytest.raises(
        ValueError,
        match=r"score_centering reads .* likeliest tokens, and engine-0 gives none: use rollout=vllm",
    ):
        sampling_spec(centred, TOKENIZER, info(gives_candidates=False))
    plain = config(model, reward_file, tmp_path, "objective=reinforce")
    assert sampling_spec(plain, TOKENIZER, info(gives_candidates=False)).candidates == 0


def test_the_objective_is_bound_with_the_runs_parameters(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "objective=gspo", "objective.params.clip_low=1e-4")
    assert make_objective(c).resolved["clip_low"] == 1e-4
    with pytest.raises(ValueError, match=r"no parameter 'clip_lo'"):
        make_objective(replace(c, objective=replace(c.objective, params={"clip_lo": 1.0})))


def test_sinks_follow_the_logger(model, reward_file, tmp_path, capsys):
    c = config(model, reward_file, tmp_path)
    sinks = make_sinks(c, tmp_path, 0, None)
    assert type(sinks.record).__name__ == "MetricsFile"
    assert [type(s).__name__ for s in sinks.others] == ["SamplesFile"]
    c = replace(c, logger=replace(c.logger, console=True))
    capsys.readouterr()
    others = make_sinks(c, tmp_path, 0, None, ["learner-0 node1 gpu=3"]).others
    assert [type(s).__name__ for s in others] == ["SamplesFile", "ConsoleSink"]
    assert others[1].total == 3
    (task,) = make_sinks(c, tmp_path, 2, None).others[1].progress.tasks
    assert (task.completed, task.total) == (2, 3)
    assert capsys.readouterr().out == "learner-0 node1 gpu=3\n"


def test_the_objective_gets_every_knob_of_the_run(model, reward_file, tmp_path):
    knobs = ["objective=grpo", "objective.kl_coef=0.25", "objective.kl_estimator=k2"]
    knobs += ["objective.aggregation=token_mean", "objective.advantage=group_mean"]
    made = make_objective(config(model, reward_file, tmp_path, *knobs))
    assert (made.kl_coef, made.kl_estimator) == (0.25, "k2")
    assert (made.spec.aggregation, made.spec.advantage) == ("token_mean", "group_mean")


def test_a_rank_is_told_who_it_is_and_where_to_meet(model, reward_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gspo_dist.learners.deepspeed.learner.DeepSpeedLearner",
        lambda *args, **told: seen.append((args, told)),
    )
    monkeypatch.setattr("gspo_dist.trainer.setup.factories.cap_threads", lambda *asked: seen.append(asked))
    monkeypatch.setattr("gspo_dist.host.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "learner", replace(c.learner, backend="deepspeed", world_size=4))
    learner_factory(c, "folder", "cpu")(rank=3, world_size=4, master_addr="10.0.0.1", master_port=99)
    threads, (args, told) = seen
    assert threads == (2, "cpu")  # a fourth of eight cores
    assert args == (c.learner, "folder")
    assert {name: told[name] for name in ("rank", "world_size", "master_addr", "master_port")} == {
        "rank": 3,
        "world_size": 4,
        "master_addr": "10.0.0.1",
        "master_port": 99,
    }


def test_a_rank_that_is_told_nothing_is_alone(model, reward_file, tmp_path, monkeypatch):
    monkeypatch.setattr("gspo_dist.learners.deepspeed.learner.DeepSpeedLearner", lambda *args, **told: told)
    monkeypatch.setattr("gspo_dist.trainer.setup.factories.cap_threads", lambda *asked: None)
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "learner", replace(c.learner, backend="deepspeed"))
    told = learner_factory(c, "folder", "cpu")()
    assert (told["rank"], told["world_size"]) == (0, 1)
    assert (told["master_addr"], told["master_port"]) == ("127.0.0.1", 0)


def test_an_engine_is_told_all_that_it_cannot_find_out(model, reward_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gspo_dist.rollout.vllm.engine.VllmEngine", lambda *args, **told: seen.append((args, told))
    )
    c = config(model, reward_file, tmp_path, "seed=9", "rollout.threads=3")
    object.__setattr__(c, "rollout", replace(c.rollout, engine="vllm"))
    engine_factory(c, "folder", "cpu", 2)(name="engine-5")
    ((args, told),) = seen
    assert args == (c.rollout, "folder")
    assert told == {
        "name": "engine-5",
        "device": "cpu",
        "seed": 9,
        "record_routing": True,
        "threads": 3,
        "sleep_mode": False,
        "fp32_head": True,
        "batch_invariant": False,
    }
    object.__setattr__(c, "learner", replace(c.learner, consistency="exact"))
    engine_factory(c, "folder", "cpu", 2)(name="engine-5")
    assert seen[1] == (args, told | {"batch_invariant": True})
    knob = replace(
        c, learner=replace(c.learner, consistency="off"), rollout=replace(c.rollout, batch_invariant=True)
    )
    engine_factory(knob, "folder", "cpu", 2)(name="engine-5")
    assert seen[2] == ((knob.rollout, "folder"), told | {"batch_invariant": True})


def test_a_reference_engine_is_told_as_much(model, reward_file, tmp_path, monkeypatch):
    seen = []
    room = "gspo_dist.rollout"
    monkeypatch.setattr(f"{room}.reference.ReferenceEngine", lambda *args, **told: seen.append((args, told)))
    monkeypatch.setattr(f"{room}.policy.HFPolicy", lambda folder: f"policy of {folder}")
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "cluster", replace(c.cluster, colocated=True))
    engine_factory(c, "folder", "cpu", 2)(name="engine-5")
    ((args, told),) = seen
    assert args == (c.rollout, "policy of folder")
    assert told == {
        "name": "engine-5",
        "device": "cpu",
        "record_routing": True,
        "sleep_mode": True,
    }


def test_wandb_is_a_sink_where_a_mode_was_found(model, reward_file, tmp_path, monkeypatch):
    monkeypatch.setattr("gspo_dist.trainer.setup.factories.open_wandb", lambda *told: told)
    (tmp_path / "run_id").write_text("abc")
    lines = ["learner-0 node1 10.0.0.1 gpu=0", "engine-0 node2"]
    sinks = make_sinks(config(model, reward_file, tmp_path), tmp_path, 0, "offline", lines)
    mode, _, folder, shown, identity = sinks.others[-1]
    assert (mode, folder, identity) == ("offline", tmp_path, "abc")
    assert shown["places"] == {"learner-0": "node1 10.0.0.1 gpu=0", "engine-0": "node2"}
    monkeypatch.setattr("gspo_dist.trainer.setup.factories.open_wandb", lambda *told: None)
    sinks = make_sinks(config(model, reward_file, tmp_path), tmp_path, 0, "offline")
    assert [type(s).__name__ for s in sinks.others] == ["SamplesFile"]  # it could not be opened


def test_a_megatron_rank_finds_its_meeting_in_the_environment(model, reward_file, tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(
        "gspo_dist.learners.megatron.learner.MegatronLearner", lambda *args, **told: (args, told)
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "learner", replace(c.learner, backend="megatron", world_size=4))
    args, _ = learner_factory(c, "folder", "cpu")(
        rank=3, world_size=4, master_addr="10.0.0.1", master_port=99
    )
    assert args == (c.learner, "folder")
    found = {
        name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "99",
    }


def test_the_weight_syncs_transport_is_resolved_and_nothing_else(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    assert c.rollout.weight_sync.transport == "auto"
    assert resolved_weight_sync(c, "cpu") == replace(c.rollout.weight_sync, transport="shm")


@pytest.mark.parametrize("backend", ["eager", "deepspeed", "megatron"])
def test_a_checkpoint_is_read_by_the_module_of_its_learner(
    model, reward_file, tmp_path, monkeypatch, backend
):
    where = "eager" if backend == "eager" else f"{backend}.stored"
    reader = importlib.import_module(f"gspo_dist.learners.{where}")
    asked = []
    monkeypatch.setattr(reader, "stored_weights", lambda *given: asked.append(given) or iter(()))
    run = config(model, reward_file, tmp_path)
    learner = replace(run.learner, backend=backend, precision="bf16")
    assert list(stored_weights(learner, str(model), tmp_path)) == []
    ((folder, source, *rest),) = asked
    assert folder == tmp_path
    if backend == "eager":
        assert (source, rest) == (str(model), ["bf16"])
    elif backend == "deepspeed":
        assert source.path == Path(model)
    else:
        assert source == read_shape(Path(model))
