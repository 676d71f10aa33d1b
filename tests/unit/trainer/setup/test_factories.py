"""From names to classes, and what each process is told."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.learners.eager import EagerLearner
from gspo_dist.rollout.engine import EngineInfo
from gspo_dist.trainer.setup.factories import (
    engine_factory,
    learner_factory,
    make_objective,
    make_sinks,
    records_routing,
    sampling_spec,
)
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


def test_the_eager_learner_is_built_with_its_share_of_threads(model, reward_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    learner = learner_factory(config(model, reward_file, tmp_path), str(model), "cpu")()
    assert isinstance(learner, EagerLearner)
    assert torch.get_num_threads() == 1
    learner.close()


@pytest.mark.parametrize(
    ("extra", "moe_layers", "records"),
    [
        (["flips.every=1"], 2, True),
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


def test_the_reference_engine_stays_on_the_cpu(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    assert engine_factory(c, str(model), "cuda", 2).keywords["device"] == "cpu"


def test_how_a_run_samples(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "rollout.temperature=0.7", "seed=9")
    spec = sampling_spec(c, TOKENIZER, info())
    assert (spec.n, spec.max_tokens, spec.temperature, spec.seed) == (4, 8, 0.7, 9)
    assert spec.stop_token_ids == (7,)
    assert spec.record_routing
    assert not sampling_spec(c, TOKENIZER, info(can_record_routing=False)).record_routing
    assert sampling_spec(c, SimpleNamespace(eos_token_id=None), info()).stop_token_ids == ()


def test_r3_is_refused_on_an_engine_that_cannot_record(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "objective=grpo_r3")
    with pytest.raises(
        ValueError, match=r"routing_replay=r3 needs an engine that records .*: engine-0 cannot"
    ):
        sampling_spec(c, TOKENIZER, info(can_record_routing=False))


def test_the_objective_is_bound_with_the_runs_parameters(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "objective=gspo", "objective.params.clip_low=1e-4")
    assert make_objective(c).resolved["clip_low"] == 1e-4
    with pytest.raises(ValueError, match=r"no parameter 'clip_lo'"):
        make_objective(replace(c, objective=replace(c.objective, params={"clip_lo": 1.0})))


def test_sinks_follow_the_logger(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    sinks = make_sinks(c, tmp_path, 0, None)
    assert type(sinks.record).__name__ == "MetricsFile"
    assert [type(s).__name__ for s in sinks.others] == ["SamplesFile"]
    c = replace(c, logger=replace(c.logger, console=True))
    assert [type(s).__name__ for s in make_sinks(c, tmp_path, 0, None).others] == [
        "SamplesFile",
        "ConsoleSink",
    ]
