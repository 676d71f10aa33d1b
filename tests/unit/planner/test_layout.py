"""The three views of a run give its knobs under one set of names, for every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist import config
from gspo_dist.planner import (
    read_run,
)
from tests.unit.planner.views import (
    H100,
    LEARNER,
    QWEN,
    WORK,
    change,
    engine_of,
    plan_of,
    work_of,
)


@pytest.mark.parametrize(
    ("change", "size", "broken"),
    [
        (
            {},
            3,
            [
                "must divide num_attention_heads: got 3 and 32; try 1, 2, 4, 8, 16, 32",
                "must divide num_key_value_heads or be a multiple of it: got 3 and 4; try 1, 2, 4",
            ],
        ),
        ({}, 16, []),  # vLLM copies each of the 4 heads of keys and values to 4 GPUs
        (
            {"heads": 24},
            6,
            ["must divide num_key_value_heads or be a multiple of it: got 6 and 4; try 1, 2, 4"],
        ),
        (
            {"expert_ffn": 36},
            8,
            ["must divide moe_intermediate_size: got 8 and 36; try 1, 2, 3, 4, 6, 9, 12, 18, ..."],
        ),
        (
            {"expert_layers": (), "ffn": 36},
            8,
            ["must divide intermediate_size: got 8 and 36; try 1, 2, 3, 4, 6, 9, 12, 18, ..."],
        ),
        ({"ffn": 36}, 8, []),  # no layer is dense
        (
            {"shared_ffn": 36},
            8,
            ["must divide shared_expert_intermediate_size: got 8 and 36; try 1, 2, 3, 4, 6, 9, 12, 18, ..."],
        ),
    ],
)
def test_engines_that_vllm_would_not_start_do_not_fit(change: dict, size: int, broken: list[str]) -> None:
    result = plan_of(LEARNER, engine_of(1, size), WORK, replace(QWEN, **change), H100, 4, 16)
    assert [p for p in result.problems if p.startswith("rollout")] == [
        f"rollout.tensor_parallel {b}" for b in broken
    ]


def test_whole_experts_on_each_gpu_need_not_be_cut() -> None:
    engine = engine_of(1, 8, expert_parallel=True)
    assert engine.problems(replace(QWEN, expert_ffn=36)) == []
    assert change(engine, expert_parallel=False).problems(replace(QWEN, expert_ffn=36)) != []


def test_every_knob_of_a_run_is_read() -> None:
    run = config.RunConfig(
        learner=config.LearnerConfig(
            backend="megatron",
            world_size=16,
            token_budget=20480,
            megatron=config.MegatronConfig(
                tensor_parallel=2,
                pipeline_parallel=2,
                virtual_stages=2,
                expert_parallel=4,
                context_parallel=2,
                recompute="full",
                recompute_num_layers=3,
                optimizer_cpu_offload=True,
                precision_aware_optimizer=True,
            ),
        ),
        rollout=config.RolloutConfig(
            engines=4, tensor_parallel=2, max_num_seqs=99, gpu_memory_utilization=0.7, expert_parallel=True
        ),
        objective=config.ObjectiveConfig(name="gspo", kl_coef=0.1, routing_replay="r3"),
    )
    learner, engine, work = read_run(run)
    assert (learner.backend, learner.world_size, learner.width, learner.token_budget) == (
        "megatron",
        16,
        2,
        20480,
    )
    assert (learner.recompute, learner.recompute_num_layers) == ("full", 3)
    degrees = (
        learner.tensor,
        learner.pipeline,
        learner.virtual_stages,
        learner.expert,
        learner.expert_tensor,
    )
    assert degrees == (2, 2, 2, 4, 1)
    assert (learner.context, learner.data, learner.shards, learner.expert_shards) == (2, 2, 4, 2)
    assert learner.offload_optimizer
    assert learner.low_precision_moments
    assert learner.distributed_optimizer
    assert learner.keep_reference
    assert (learner.zero_stage, learner.offload_params) == (0, False)
    assert (engine.engines, engine.tensor_parallel, engine.width, engine.colocated) == (4, 2, 2, False)
    # A reference makes one extra pass; R3 traces are held once, whether or not flips are measured.
    assert (work.forward_passes, work.trace_sets) == (1, 1)
    assert (work.max_length, work.rollouts, work.tokens) == (9216, 1024, 1024 * 4608)
    assert work.bucket_bytes == 256 << 20


@pytest.mark.parametrize(
    ("objective", "flips", "passes", "traces"),
    [
        ({}, 0, 0, 0),
        ({}, 5, 0, 1),
        ({"old_logprobs": "recompute"}, 0, 1, 0),
        ({"old_logprobs": "recompute", "routing_replay": "r2"}, 0, 1, 1),
        ({"old_logprobs": "recompute", "routing_replay": "r2", "kl_coef": 0.1}, 5, 2, 2),
        ({"routing_replay": "r3"}, 0, 0, 1),
    ],
)
def test_passes_and_traces_follow_from_the_objective(objective, flips, passes, traces) -> None:
    step = work_of(flips=flips, **objective)
    assert (step.forward_passes, step.trace_sets) == (passes, traces)


def test_deepspeed_and_dry_runs_are_read() -> None:
    run = config.RunConfig(
        learner=config.LearnerConfig(
            backend="deepspeed",
            world_size=4,
            token_budget=9216,
            activation_checkpointing=True,
            deepspeed=config.DeepSpeedConfig(zero_stage=3, expert_parallel=2, offload_optimizer=True),
        ),
        rollout=config.RolloutConfig(engine="reference"),
    )
    learner, engine, _ = read_run(run)
    assert (learner.zero_stage, learner.expert, learner.offload_optimizer, learner.recompute) == (
        3,
        2,
        True,
        "full",
    )
    assert engine.engines == 0
