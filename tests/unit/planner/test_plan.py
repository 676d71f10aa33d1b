"""Verdicts: what fits, what does not, and why."""

from __future__ import annotations

from dataclasses import replace

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
    of eight ranks. Pinned blocks add a third to both, and a checkpoint 8 bytes per held parameter."""
    layout = change(LEARNER, world_size=8, optimizer_cpu_offload=True)
    engine = engine_of(engines=8, colocated=True, gpu_memory_utilization=0.6)
    result = plan_of(layout, engine, WORK, QWEN, find_gpu("H200"), host_gib=1450)
    assert result.host.bytes_of("sleeping engines") == 16 * QWEN.total
    assert len(result.problems) == 1
    assert result.problems[0].startswith("host: needs")
    assert result.advice[0].startswith("lower rollout.engines")
    assert plan_of(layout, change(engine, engines=7), WORK, QWEN, find_gpu("H200"), host_gib=1450).fits


def test_colocation_is_one_host() -> None:
    engine = engine_of(engines=16, colocated=True, gpu_memory_utilization=0.6)
    [problem] = plan_of(
        change(LEARNER, optimizer_cpu_offload=True),
        engine,
        WORK,
        QWEN,
        find_gpu("H200"),
        nodes=2,
        host_gib=2000,
    ).problems
    assert problem == (
        "GPUs: cluster.colocated shares the GPUs of one host: got learner.world_size 16 and 8 GPUs per node; "
        "lower it, or set cluster.colocated=false"
    )


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
