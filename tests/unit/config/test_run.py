"""What the sections of a run must agree on: the rule, what was got, the way out."""

from __future__ import annotations

import pytest

from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import from_mapping


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rollout": {"group_size": 1}},
            r"rollout.group_size must be at least 2 for group_std .*: got 1",
        ),
        (
            {"mini_batches": 5},
            r"mini_batches must divide rollout.prompts_per_step .*: got 5 and 64; try 1, 2, 4, 8",
        ),
        (
            {"rollout": {"prompts_per_step": 4, "group_size": 2}, "learner": {"world_size": 3}},
            r"every data-parallel replica a rollout: got 2 rollouts for 3 replicas; raise rollout",
        ),
        (
            {"learner": {"token_budget": 9215}},
            r"learner.token_budget must hold the longest sequence .*: got 9215 .* = 9216; raise the budget",
        ),
        (
            {"learner": {"forward_token_budget": 9215}},
            r"learner.forward_token_budget must hold the longest sequence .*: got 9215 .* = 9216; raise",
        ),
        ({"learner": {"forward_token_budget": 0}}, r"learner.forward_token_budget must be at least 1: got 0"),
        (
            {"learner": {"world_size": 3, "deepspeed": {"expert_parallel": 2}}},
            r"learner.deepspeed.expert_parallel must divide learner.world_size: got 2 and 3; try 1, 3",
        ),
        (
            {"learner": {"backend": "megatron", "world_size": 6, "megatron": {"tensor_parallel": 4}}},
            r"tensor_parallel x pipeline_parallel x context_parallel .*: got 4 and 6; try 1, 2, 3, 6",
        ),
        (
            {"learner": {"megatron": {"virtual_stages": 2}}},
            r"learner.megatron.virtual_stages needs pipeline_parallel > 1: got virtual_stages 2",
        ),
        (
            {"learner": {"backend": "eager", "world_size": 2}},
            r"learner.world_size must be 1 for the eager learner: got 2",
        ),
        ({"learner": {"deepspeed": {"offload_params": True}}}, r"offload_params needs zero_stage 3: got 2"),
        ({"objective": {"routing_replay": "r2"}}, r"r2 needs recompute"),
        ({"objective": {"params": {"clip_low": 0.2, "clip_high": 0.27}}}, r"allow_wide_clip"),
        ({"objective": {"name": "gspoo"}}, r"did you mean 'gspo'"),
        ({"objective": {"aggregation": "token_mean"}}, r"sequence_mean"),
        ({"cluster": {"in_process": True}}, r"cluster.in_process needs learner.backend eager: got deepspeed"),
        (
            {"cluster": {"in_process": True}, "rollout": {"engines": 2}},
            r"cluster.in_process runs one engine in this process: got rollout.engines 2; set it to 1",
        ),
        (
            {"cluster": {"nodes": 2}},
            r"cluster.nodes is for .* joined: got 2 without cluster.address; set cluster=ray",
        ),
        (
            {"checkpoint": {"accept": ["reward", "learner.optimizer.learning_rate"]}},
            r"checkpoint.accept must hold .*: got 'learner.optimizer.learning_rate'; did you mean",
        ),
        ({"profile": {"steps": [0]}}, r"profile.steps must hold whole numbers from 1 on: got 0 in \[0\]"),
        ({"profile": {"steps": [1], "ranks": [-1]}}, r"profile.ranks must hold .* from 0 on: got -1"),
        (
            {"steps": 20, "profile": {"steps": [3, 21]}},
            r"profile.steps must be among the run's own \(up to 20, by steps\): got \[3, 21\]; leave 21 out",
        ),
        (
            {"profile": {"steps": [3], "ranks": [0, 1]}},
            r"profile.ranks must be among .* \(up to 0, by learner.world_size\): got \[0, 1\]; leave 1",
        ),
        ({"plan": {"gpu": ""}}, r"plan.gpu needs a value: got none; leave it out, or write plan.gpu=null"),
        ({"plan": {"model": ""}}, r"plan.model needs a value"),
        (
            {"plan": {"length_mean": 900, "lengths_from": "runs/a"}},
            r"plan.length_mean and plan.lengths_from both give the mean: got 900 and runs/a; leave one",
        ),
        ({"plan": {"fallback_model": ""}}, r"plan.fallback_model needs a value"),
    ],
)
def test_bad_input_names_rule_value_and_way_out(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(RunConfig, values)


@pytest.mark.parametrize(
    "values",
    [
        {"rollout": {"group_size": 1}, "objective": {"advantage": "none"}},
        {"rollout": {"group_size": 2}},
        {"rollout": {"prompts_per_step": 4, "group_size": 3}, "learner": {"world_size": 3}},
        {"learner": {"token_budget": 9216}},
        {"learner": {"token_budget": 16384, "forward_token_budget": 9216}},
        {"learner": {"forward_token_budget": 131072, "deterministic": True}},
        {"learner": {"deepspeed": {"offload_params": True, "zero_stage": 3}}},
        {"learner": {"megatron": {"virtual_stages": 2, "pipeline_parallel": 2}}},
        {"learner": {"backend": "megatron", "world_size": 8, "megatron": {"tensor_parallel": 4}}},
        # knobs of another backend are not read
        {"learner": {"backend": "megatron", "world_size": 3, "deepspeed": {"expert_parallel": 2}}},
        {"cluster": {"in_process": True}, "learner": {"backend": "eager"}, "reward": {"workers": 2}},
        {"objective": {"params": {"clip_low": 0.2, "clip_high": 0.27}, "allow_wide_clip": True}},
        {"checkpoint": {"accept": ["reward", "learner.optimizer", "data.train"]}},
        {"steps": 20, "profile": {"steps": [20], "ranks": [1]}, "learner": {"world_size": 2}},
        {"profile": {"ranks": [7]}},  # nothing is recorded
        # the keys of a mapping are the user's own
        {"checkpoint": {"accept": ["objective.params.clip_low", "learner.megatron.ddp.bucket_size"]}},
    ],
)
def test_what_agrees_runs(values):
    from_mapping(RunConfig, values)


def test_the_advantage_is_the_objectives_own_unless_named():
    assert RunConfig().objective.advantage_name == "group_std"
    own = {"objective": {"name": "reinforce", "old_logprobs": "recompute", "guard": {"action": "off"}}}
    assert from_mapping(RunConfig, own).objective.advantage_name == "leave_one_out"
    named = {"objective": {"advantage": "group_mean"}}
    assert from_mapping(RunConfig, named).objective.advantage_name == "group_mean"
    mine = {"objective": {"name": "a.b:C", "old_logprobs": "recompute", "guard": {"action": "off"}}}
    assert from_mapping(RunConfig, mine).objective.advantage_name is None  # a user's objective brings its own
    assert from_mapping(RunConfig, mine | {"rollout": {"group_size": 1}}).rollout.group_size == 1


@pytest.mark.parametrize(("learner", "rollout"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_the_two_16_bit_precisions_are_no_pair(learner, rollout):
    def run(engine="vllm", rollout=rollout):
        return from_mapping(
            RunConfig,
            {"learner": {"precision": learner}, "rollout": {"precision": rollout, "engine": engine}},
        )

    with pytest.raises(
        ValueError, match=rf"got learner.precision={learner} and rollout.precision={rollout};"
    ):
        run()
    for fits in ("fp32", learner):
        assert run(rollout=fits).learner.precision == learner
    run(engine="reference")  # it computes in fp32, whatever the knob says
