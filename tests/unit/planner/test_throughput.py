"""The rough clock against arithmetic by hand and against published runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.planner import (
    EngineLayout,
    LearnerLayout,
    Workload,
    find_gpu,
)
from gspo_dist.planner.throughput import ASSUMPTIONS, decode_step_s, experts_touched, step_time
from tests.unit.planner.views import (
    BOTH_PASSES,
    ENGINE,
    H100,
    QWEN,
    engine_of,
    learner_of,
    work_of,
)


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
    assert time.total_s == pytest.approx(
        time.collect_s + time.logprobs_s + time.train_s + time.sync_s + time.side_s
    )
