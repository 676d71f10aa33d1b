"""Verdicts, advice, and the rough clock against published runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist import config
from gspo_dist.models.shape import find_model
from gspo_dist.planner import (
    EngineLayout,
    LearnerLayout,
    Workload,
    find_gpu,
    format_plan,
    read_run,
)
from gspo_dist.planner.memory import learner_memory
from gspo_dist.planner.throughput import ASSUMPTIONS, decode_step_s, experts_touched, step_time
from tests.unit.planner.views import change, engine_of, learner_of, plan_of, work_of

QWEN = find_model("Qwen3-30B-A3B")
H100 = find_gpu("H100")
WORK = work_of(prompts=256, group=16, prompt=2048, completion=8192)
LEARNER = learner_of(
    world_size=16, token_budget=20480, tensor_parallel=2, expert_parallel=8, recompute="full"
)
ENGINE = engine_of(engines=8, tensor_parallel=2)
BOTH_PASSES = {"old_logprobs": "recompute", "kl_coef": 0.1}


def test_a_layout_that_the_field_runs_fits() -> None:
    result = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4)
    assert result.fits
    assert not result.advice
    assert result.learner.total < 0.8 * H100.memory


def test_the_advice_for_a_learner_that_does_not_fit_makes_it_fit() -> None:
    tight = change(LEARNER, recompute="none")
    result = plan_of(tight, ENGINE, WORK, QWEN, H100, nodes=4)
    assert not result.fits
    assert "learner: a rank lacks" in result.problems[0]
    assert "activations" in result.problems[0]
    # one halving of the token budget is the cheapest change, and not enough; the first that is enough
    # is named
    named = dict(change.split("=") for change in result.advice[0].removeprefix("learner: ").split())
    changed = {k.split(".")[-1]: int(v) if v.isdigit() else v for k, v in named.items()}
    assert learner_memory(QWEN, change(tight, **changed), H100.memory)[0].fits


def test_several_changes_are_named_together_where_one_is_not_enough() -> None:
    layout = learner_of("deepspeed", world_size=16, token_budget=10240, zero_stage=2)
    result = plan_of(layout, ENGINE, WORK, QWEN, H100, nodes=4)
    assert result.advice == ("learner: learner.activation_checkpointing=true learner.deepspeed.zero_stage=3",)


def test_offload_is_advised_with_the_distributed_optimizer_that_it_needs() -> None:
    """33 GiB with the optimiser in host memory, and nothing less frees enough of 39."""
    layout = change(LEARNER, world_size=8, distributed_optimizer=False)
    result = plan_of(layout, change(ENGINE, engines=4), WORK, QWEN, find_gpu("A100-40GB"), nodes=2)
    assert result.advice == (
        "learner: learner.megatron.distributed_optimizer=true learner.megatron.optimizer_cpu_offload=true",
    )


def test_nothing_is_advised_that_cannot_help() -> None:
    result = plan_of(learner_of("eager", token_budget=10240), ENGINE, WORK, QWEN, H100, nodes=4)
    assert result.advice == ("learner: more ranks (learner.world_size), or a smaller model",)


def test_an_engine_without_room_for_one_sequence_is_told_to_split() -> None:
    work = work_of(256, 16, prompt=2048, completion=120_000)
    result = plan_of(
        change(LEARNER, token_budget=131072, context_parallel=2, tensor_parallel=4),
        change(ENGINE, tensor_parallel=1),
        work,
        QWEN,
        H100,
        nodes=4,
    )
    assert any("engine: its KV cache holds" in p and "122,048" in p for p in result.problems)
    assert "engine: rollout.tensor_parallel=2" in result.advice


def test_too_few_gpus_and_sizes_that_do_not_divide_are_refused() -> None:
    few = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=2)
    assert few.problems == ("GPUs: learner.world_size 16 and 8 engines of 2 need 32, and 2 x 8 are there",)
    odd = plan_of(LEARNER, change(ENGINE, tensor_parallel=3), WORK, QWEN, H100, nodes=4)
    assert "rollout.tensor_parallel must divide num_attention_heads: got 3 and 32" in odd.problems[0]
    assert odd.learner.items == ()
    assert "does not fit" in format_plan(odd)


def test_colocated_engines_count_no_gpus_of_their_own_but_leave_room_for_the_states() -> None:
    learner = change(LEARNER, world_size=8)
    engine = engine_of(engines=8, colocated=True, gpu_memory_utilization=0.6)
    crowded = plan_of(learner, engine, WORK, QWEN, H100)  # 67 GiB of states beside 48 GiB of engine
    assert "beside a colocated engine" in crowded.problems[0]
    states = change(learner, optimizer_cpu_offload=True)
    roomy = find_gpu("H200")
    assert plan_of(states, engine, WORK, QWEN, roomy).problems == ()
    greedy = plan_of(states, change(engine, gpu_memory_utilization=0.9), WORK, QWEN, roomy)
    assert "beside a colocated engine" in greedy.problems[0]


def test_a_host_without_memory_for_sleeping_engines_does_not_fit() -> None:
    """Eight engines asleep hold 16 bytes a parameter of the host, as much as the offloaded states
    of eight ranks."""
    layout = change(LEARNER, world_size=8, optimizer_cpu_offload=True)
    engine = engine_of(engines=8, colocated=True, gpu_memory_utilization=0.6)
    result = plan_of(layout, engine, WORK, QWEN, find_gpu("H200"), host_gib=900)
    assert result.host.bytes_of("sleeping engines") == 16 * QWEN.total
    assert len(result.problems) == 1
    assert result.problems[0].startswith("host: needs")
    assert result.advice[0].startswith("lower rollout.engines")
    assert plan_of(layout, change(engine, engines=7), WORK, QWEN, find_gpu("H200"), host_gib=900).fits


def test_colocation_is_one_host() -> None:
    engine = engine_of(engines=16, colocated=True, gpu_memory_utilization=0.6)
    [problem] = plan_of(
        change(LEARNER, optimizer_cpu_offload=True), engine, WORK, QWEN, find_gpu("H200"), nodes=2
    ).problems
    assert problem == (
        "GPUs: cluster.colocated shares the GPUs of one host: got learner.world_size 16 and 8 GPUs per node; "
        "lower it, or set cluster.colocated=false"
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


def test_a_run_without_engines_has_none_to_refuse() -> None:
    assert plan_of(LEARNER, engine_of(engine="reference", tensor_parallel=3), WORK, QWEN, H100, nodes=2).fits


def test_a_cpu_host_cuts_no_engine_and_puts_none_to_sleep() -> None:
    tiny = replace(QWEN, vocab=512, hidden=128, layers=2, ffn=64, expert_ffn=64, expert_layers=(True,) * 2)
    work, learner = (
        work_of(prompt=64, completion=128),
        learner_of("eager", token_budget=2048),
    )
    assert plan_of(learner, engine_of(), work, tiny, None).fits
    [cut] = plan_of(learner, engine_of(tensor_parallel=2), work, tiny, None).problems
    assert cut.startswith("rollout.tensor_parallel must be 1 on a CPU host: got 2")
    [asleep] = plan_of(learner, engine_of(colocated=True), work, tiny, None).problems
    assert asleep.startswith("cluster.colocated needs GPUs")


def test_what_the_run_refuses_is_reported_in_its_words_and_never_advised() -> None:
    """The change that a plan advises of itself is passed over where the run would refuse it."""
    tight = change(LEARNER, recompute="none", token_budget=10240)
    free = plan_of(tight, ENGINE, WORK, QWEN, H100, nodes=4)
    assert free.advice == ("learner: learner.megatron.recompute=full",)

    def refusals(layout: LearnerLayout) -> list[str]:
        return ["no full recomputation here: drop it"] if layout.recompute == "full" else []

    held = plan_of(tight, ENGINE, WORK, QWEN, H100, nodes=4, refusals=refusals)
    assert held.advice
    assert "recompute=full" not in held.advice[0]
    refused = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4, refusals=refusals)
    assert refused.problems == ("no full recomputation here: drop it",)


def test_a_node_has_the_gpus_of_its_kind_unless_told() -> None:
    assert plan_of(LEARNER, ENGINE, WORK, QWEN, find_gpu("GB200"), nodes=4).gpus_per_node == 4
    assert plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4).gpus_per_node == 8
    few = plan_of(LEARNER, ENGINE, WORK, QWEN, find_gpu("GB200"), nodes=4)
    assert few.problems == ("GPUs: learner.world_size 16 and 8 engines of 2 need 32, and 4 x 4 are there",)
    assert plan_of(LEARNER, ENGINE, WORK, QWEN, find_gpu("GB200"), nodes=8).fits
    assert plan_of(LEARNER, ENGINE, WORK, QWEN, find_gpu("GB200"), nodes=4, gpus_per_node=8).fits


def test_a_host_without_memory_for_offloaded_states_does_not_fit() -> None:
    layout = change(LEARNER, world_size=8, optimizer_cpu_offload=True)
    result = plan_of(layout, change(ENGINE, engines=4), WORK, QWEN, H100, nodes=2, host_gib=256)
    assert any(
        p.startswith("host: needs") for p in result.problems
    )  # 16 bytes x 30.5 B parameters on one host
    assert plan_of(layout, change(ENGINE, engines=4), WORK, QWEN, H100, nodes=2, host_gib=1024).fits


def test_a_cpu_host_adds_up_its_processes() -> None:
    tiny = replace(
        QWEN,
        vocab=512,
        hidden=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        num_experts=8,
        top_k=2,
        expert_ffn=64,
        expert_layers=(True,) * 2,
    )
    result = plan_of(
        learner_of("deepspeed", world_size=2, token_budget=2048),
        engine_of(engines=1),
        work_of(prompt=64, completion=128),
        tiny,
        None,
        host_gib=16,
    )
    assert result.fits
    assert result.step is None
    assert result.engine is not None
    assert result.host.bytes_of("learner ranks") == 2 * result.learner.total
    assert result.host.bytes_of("engines") == result.engine.table.total
    assert not plan_of(
        learner_of(world_size=1, token_budget=10240), ENGINE, WORK, QWEN, None, host_gib=16
    ).fits


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


def test_gpus_are_found_by_family_by_name_and_by_what_the_driver_says() -> None:
    assert find_gpu("h100") is find_gpu("NVIDIA H100 80GB HBM3") is find_gpu("H100-80GB")
    assert find_gpu("H20").name == "H20-96GB"
    assert find_gpu("h200").name == "H200-141GB"
    assert find_gpu("NVIDIA A100-SXM4-40GB").name == "A100-40GB"
    with pytest.raises(ValueError, match="A100-40GB, A100-80GB"):
        find_gpu("a100")
    with pytest.raises(ValueError, match="got 'abacus'"):
        find_gpu("abacus")


def test_experts_touched_grows_from_top_k_to_all() -> None:
    assert experts_touched(QWEN, 1) == pytest.approx(8 / 128)
    assert experts_touched(QWEN, 2) == pytest.approx(1 - (120 / 128) ** 2)
    assert experts_touched(QWEN, 1000) == pytest.approx(1.0, abs=1e-12)


def test_one_sequence_decodes_at_the_speed_of_its_weights() -> None:
    assume = replace(ASSUMPTIONS, decode_bandwidth=1.0, decode_overhead_s=0.0)
    # one token reads the active weights, less the input embedding, once: 3.04 B x 2 bytes at 3.35 TB/s
    expected = 2 * QWEN.active_without_embedding / 3.35e12
    assert decode_step_s(QWEN, engine_of(), H100, 1, 0, assume) == pytest.approx(expected, rel=1e-12)


def test_training_time_follows_flops_over_rate() -> None:
    assume = replace(ASSUMPTIONS, megatron_mfu=0.5)
    layout = learner_of(world_size=64, recompute="full")
    work = work_of(1, 1024, prompt=1, completion=8191, mean_fill=1.0)
    time = step_time(QWEN, layout, ENGINE, work, H100, 64, assume)
    matrices = 8 * 3_041_867_776 * 1024 * 8192
    attention = 4 * (2 * 48 * 4096 * 8192) * 1024 * 8192
    assert time.train_s == pytest.approx((matrices + attention) / (64 * 989e12 * 0.5), rel=1e-12)
    assert time.logprobs_s == 0.0


@pytest.mark.parametrize(
    ("published_s", "gpu", "learner", "engine", "work"),
    [
        # NeMo-RL 0.6: 32 H100, GRPO, 2048 rollouts of 3.2k tokens, on-policy
        (
            192.0,
            "H100",
            learner_of(world_size=32, token_budget=4096, expert_parallel=8),
            engine_of(engines=16, tensor_parallel=2, colocated=True, gpu_memory_utilization=0.6),
            work_of(128, 16, prompt=1024, completion=3072, mean_fill=0.8, **BOTH_PASSES),
        ),
        # verl: 128 H20, GRPO, 512 x 16 rollouts of at most 8k tokens, colocated
        (
            497.9,
            "H20",
            learner_of(world_size=128, token_budget=10240, expert_parallel=8, recompute="full"),
            engine_of(engines=32, tensor_parallel=4, colocated=True, gpu_memory_utilization=0.6),
            work_of(512, 16, prompt=2048, completion=8192, mini_batches=8, **BOTH_PASSES),
        ),
    ],
)
def test_the_rough_clock_is_within_a_factor_of_two_of_published_steps(
    published_s: float, gpu: str, learner: LearnerLayout, engine: EngineLayout, work: Workload
) -> None:
    time = step_time(QWEN, learner, engine, work, find_gpu(gpu), 100)
    assert 0.5 < time.total_s / published_s < 2.0
    assert time.total_s == pytest.approx(time.collect_s + time.logprobs_s + time.train_s + time.sync_s)


def test_the_text_names_sizes_verdict_and_advice() -> None:
    text = format_plan(plan_of(change(LEARNER, recompute="none"), ENGINE, WORK, QWEN, H100, nodes=4))
    for part in (
        "30.532 B parameters, 3.353 B active",
        "98,304 bytes per token",
        "4 x 8 H100-80GB",
        "does not fit",
        "try learner: ",
        "kv_cache",
    ):
        assert part in text


def test_small_models_are_written_in_small_units() -> None:
    tiny = replace(
        QWEN,
        vocab=512,
        hidden=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        num_experts=8,
        top_k=2,
        expert_ffn=64,
        expert_layers=(True,) * 2,
    )
    text = format_plan(
        plan_of(
            learner_of("eager", token_budget=2048),
            engine_of(),
            work_of(8, 8, prompt=64, completion=128, mini_batches=4),
            tiny,
            None,
        )
    )
    # 2 tables of 65,536; 2 layers of 49,152 attention, 320 norms, 1,024 router, 8 experts of 24,576; 128
    assert tiny.total == 131_072 + 2 * (49_152 + 320 + 1_024 + 196_608) + 128
    assert tiny.active == tiny.total - 2 * 6 * 24_576
    assert "0.625 M parameters, 0.330 M active" in text
    assert any(line.split() == ["weights", "1.2", "MiB"] for line in text.splitlines())  # 2 bytes a parameter
