"""Verdicts: what fits, what does not, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.planner import find_gpu, format_plan
from tests.unit.planner.views import (
    ENGINE,
    H100,
    LEARNER,
    QWEN,
    TINY,
    WORK,
    change,
    engine_of,
    learner_of,
    plan_of,
    work_of,
)


def test_a_layout_that_the_field_runs_fits() -> None:
    result = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4)
    assert result.fits
    assert not result.advice
    assert result.learner.total < 0.8 * H100.memory


def test_too_few_gpus_and_sizes_that_do_not_divide_are_refused() -> None:
    few = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=2)
    assert few.problems == ("GPUs: learner.world_size 16 and 8 engines of 2 need 32, and 2 x 8 are there",)
    odd = plan_of(LEARNER, change(ENGINE, tensor_parallel=3), WORK, QWEN, H100, nodes=4)
    assert "rollout.tensor_parallel must divide num_attention_heads: got 3 and 32" in odd.problems[0]
    assert odd.learner.items == ()
    assert "does not fit" in format_plan(odd)


def test_colocated_engines_count_no_gpus_of_their_own_and_the_learner_leaves_them_the_gpu() -> None:
    """Its states are in host memory while they sample, and its weights are beside theirs in a publication."""
    learner, engine = change(LEARNER, world_size=8), engine_of(engines=4, tensor_parallel=2, colocated=True)
    low = change(learner, recompute="full", expert_parallel=8, optimizer_cpu_offload=True)
    assert plan_of(low, engine, WORK, QWEN, H100).problems == ()
    # 0.97 of 79.2 GiB and the learner's 3 GiB of context are more than there is
    greedy = plan_of(low, change(engine, gpu_memory_utilization=0.97), WORK, QWEN, H100)
    assert greedy.problems[0].startswith("learner: a rank lacks 0.6 GiB beside a colocated engine")


def test_in_a_publication_the_weights_of_both_sides_are_on_a_shared_gpu() -> None:
    """56.87 GiB twice, two buckets of 0.25, contexts of 3 and 1.5: 118.7 GiB. Each side alone needs less."""
    learner = learner_of(
        "deepspeed",
        world_size=8,
        token_budget=20480,
        zero_stage=2,
        offload_optimizer=True,
        activation_checkpointing=True,
    )
    engine = engine_of(engines=8, colocated=True)

    def problems(memory_gib: float) -> tuple[str, ...]:
        gpu = replace(H100, memory_gib=memory_gib)
        return plan_of(learner, engine, WORK, QWEN, gpu, host_gib=9000).problems

    assert problems(119.0) == ()
    [short] = problems(110.0)
    assert short.startswith("learner: a rank lacks 8.7 GiB beside a colocated engine (70.0 GiB of 110.0 GiB")


def test_30b_fits_32_h100_colocated() -> None:
    """16 engines of two GPUs on the GPUs of 32 ranks; by hand from 3.624 B expert and 1.541 B other
    parameters a rank, of which 4 and 32 ranks share the optimiser states."""
    learner = change(LEARNER, world_size=32, tensor_parallel=1, expert_parallel=8, recompute="full")
    engine = engine_of(engines=16, tensor_parallel=2, colocated=True)
    result = plan_of(learner, engine, WORK, QWEN, H100, nodes=4)
    assert result.problems == ()
    experts, dense = 28_991_029_248 // 8, 30_532_122_624 - 28_991_029_248
    assert result.host.bytes_of("parked weights") == 8 * 2 * (experts + dense)
    states = 12 * (experts / 4 + dense / 32)
    assert result.host.bytes_of("parked optimizer") == pytest.approx(8 * states, abs=8)
    each = result.engine.table.bytes_of("weights")
    assert result.host.bytes_of("sleeping engines") == 8 * each  # four engines of two GPUs
    assert result.step.gpus == 32
    few = plan_of(learner, engine, WORK, QWEN, H100, nodes=4, host_gib=500)
    assert few.problems[0].startswith("host: needs")
    assert few.advice == (
        "raise rollout.tensor_parallel with fewer engines, or take hosts with more memory or more hosts",
    )


def test_colocated_sizes_that_cannot_be_placed_are_refused() -> None:
    learner = change(LEARNER, world_size=16, optimizer_cpu_offload=True)

    def problems(engine, nodes: int) -> tuple[str, ...]:
        return plan_of(learner, engine, WORK, QWEN, H100, nodes=nodes).problems

    assert problems(engine_of(engines=8, tensor_parallel=2, colocated=True), 2) == ()
    [one_host] = problems(engine_of(engines=8, tensor_parallel=2, colocated=True), 1)
    assert one_host == "GPUs: learner.world_size 16 needs as many, and 1 x 8 are there"
    [many] = problems(engine_of(engines=5, tensor_parallel=4, colocated=True), 2)
    assert many == "GPUs: colocated engines share the learner's GPUs: got 5 engines of 4 and 16 ranks"
    [torn] = problems(engine_of(engines=1, tensor_parallel=16, colocated=True), 2)
    assert torn.endswith("shares the GPUs of consecutive ranks on one node: its size must divide 8")


def test_a_run_without_engines_has_none_to_refuse() -> None:
    assert plan_of(LEARNER, engine_of(engine="reference", tensor_parallel=3), WORK, QWEN, H100, nodes=2).fits


def test_a_cpu_host_cuts_engines_and_puts_none_to_sleep() -> None:
    tiny = replace(QWEN, vocab=512, hidden=128, layers=2, ffn=64, expert_ffn=64, expert_layers=(True,) * 2)
    work, learner = (
        work_of(prompt=64, completion=128),
        learner_of("eager", token_budget=2048),
    )
    assert plan_of(learner, engine_of(), work, tiny, None).fits
    assert plan_of(learner, engine_of(tensor_parallel=2), work, tiny, None).fits
    [asleep] = plan_of(learner, engine_of(colocated=True), work, tiny, None).problems
    assert asleep.startswith("cluster.colocated needs GPUs")


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
    result = plan_of(
        learner_of("deepspeed", world_size=2, token_budget=2048),
        engine_of(engines=1),
        work_of(prompt=64, completion=128),
        TINY,
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


def test_keys_passed_on_are_counted_or_named_as_not_counted() -> None:
    half = {"optimizer_offload_fraction": 0.5}
    counted = LEARNER.changed("megatron", optimizer_cpu_offload=True, optimizer=half)
    assert counted.not_counted == []
    other = counted.changed("megatron", transformer={"moe_deepep_num_sms": 20}, ddp={"bucket_size": 5})
    named = ["learner.megatron.transformer.moe_deepep_num_sms", "learner.megatron.ddp.bucket_size"]
    assert other.not_counted == named
    text = format_plan(plan_of(other, ENGINE, WORK, QWEN, H100, nodes=4))
    assert f"note: not counted, neither in memory nor in time: {', '.join(named)}" in text
    assert "not counted" not in format_plan(plan_of(counted, ENGINE, WORK, QWEN, H100, nodes=4))
    zero = {
        "zero_optimization": {"reduce_bucket_size": 100, "stage3_max_live_parameters": 7},
        "dump_state": True,
    }
    assert learner_of("deepspeed", config=zero).not_counted == [
        "learner.deepspeed.config.zero_optimization.stage3_max_live_parameters",
        "learner.deepspeed.config.dump_state",
    ]
