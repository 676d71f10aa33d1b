"""The configuration refuses what cannot run, by rule, value and way out, and survives a round trip."""

from __future__ import annotations

import pytest

from gspo_dist.config import (
    LearnerConfig,
    MegatronConfig,
    RolloutConfig,
    RunConfig,
)
from gspo_dist.config.mapping import from_mapping, to_mapping


def test_round_trip():
    config = from_mapping(RunConfig, {"steps": 3, "objective": {"name": "grpo", "old_logprobs": "recompute"}})
    assert from_mapping(RunConfig, to_mapping(config)) == config
    assert config.objective.advantage_name == "group_std"


def test_default_is_the_paper():
    config = RunConfig()
    assert (config.objective.name, config.objective.old_logprobs, config.mini_batches) == (
        "gspo",
        "rollout",
        4,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learner": {"optimizr": {}}}, r"unknown config key 'learner.optimizr': did you mean 'optimizer'"),
        ({"steps": "many"}, r"steps must be a whole number: got 'many'"),
        ({"rollout": {"group_size": 1}}, r"rollout.group_size must be at least 2 for group_std advantages"),
        ({"rollout": {"top_p": 0.9}}, r"rollout.top_p must be 1 for training: got 0.9"),
        (
            {"mini_batches": 5},
            r"mini_batches must divide rollout.prompts_per_step .*: got 5 and 64; try 1, 2, 4, 8",
        ),
        (
            {"learner": {"token_budget": 100}},
            r"learner.token_budget must hold the longest sequence .*: got 100",
        ),
        (
            {"learner": {"world_size": 3, "deepspeed": {"expert_parallel": 2}}},
            r"must divide learner.world_size: got 2 and 3; try 1, 3",
        ),
        (
            {"learner": {"backend": "eager", "world_size": 2}},
            r"learner.world_size must be 1 for the eager learner",
        ),
        ({"objective": {"routing_replay": "r2"}}, r"r2 needs recompute"),
        ({"objective": {"params": {"clip_low": 0.2, "clip_high": 0.27}}}, r"allow_wide_clip"),
        ({"objective": {"name": "gspoo"}}, r"did you mean 'gspo'"),
        ({"cluster": {"in_process": True}}, r"cluster.in_process needs learner.backend eager"),
        ({"learner": {"optimizer": {"lr": 0.0}}}, r"learner.optimizer.lr must be above 0"),
        ({"learner": {"optimizer": {"eps": 0.0}}}, r"learner.optimizer.eps must be above 0"),
        (
            {"learner": {"optimizer": {"min_lr_ratio": 1.5}}},
            r"learner.optimizer.min_lr_ratio must be in \[0, 1\]: got 1.5",
        ),
        ({"rollout": {"kv_cache_gib": 0.0}}, r"rollout.kv_cache_gib must be above 0"),
        ({"rollout": {"timeout_s": -1.0}}, r"rollout.timeout_s must be above 0"),
        ({"rollout": {"threads": -2}}, r"rollout.threads must be at least 0"),
        ({"learner": {"threads": -2}}, r"learner.threads must be at least 0"),
        ({"cluster": {"placement_timeout_s": 0.0}}, r"cluster.placement_timeout_s must be above 0"),
        ({"evaluation": {"top_p": 7.0}}, r"evaluation.top_p must be in \(0, 1\]: got 7.0"),
        ({"logger": {"samples_per_step": -1}}, r"logger.samples_per_step must be at least 0: got -1"),
        (
            {"checkpoint": {"accept": ["reward", "learner.optimizer.learning_rate"]}},
            r"checkpoint.accept must hold .*: got .learner.optimizer.learning_rate.; did you mean",
        ),
        ({"plan": {"nodes": 0}}, r"plan.nodes must be at least 1: got 0"),
        ({"plan": {"gpus_per_node": -8}}, r"plan.gpus_per_node must be at least 1: got -8"),
        ({"plan": {"gpu": ""}}, r"plan.gpu needs a value: got none; leave it out, or write plan.gpu=null"),
    ],
)
def test_bad_input_names_rule_value_and_way_out(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(RunConfig, values)


def test_a_wide_clip_runs_when_insisted_on():
    config = from_mapping(
        RunConfig, {"objective": {"params": {"clip_low": 0.2, "clip_high": 0.27}, "allow_wide_clip": True}}
    )
    assert config.objective.params == {"clip_low": 0.2, "clip_high": 0.27}


def test_derived_numbers():
    learner = LearnerConfig(
        backend="megatron", world_size=16, megatron=MegatronConfig(tensor_parallel=2, context_parallel=2)
    )
    assert learner.data_parallel == 4
    assert RolloutConfig(prompts_per_step=6, group_size=4).rollouts_per_step == 24
