"""What a printed plan says."""

from __future__ import annotations

from gspo_dist.planner import format_plan
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
    text = format_plan(
        plan_of(
            learner_of("eager", token_budget=2048),
            engine_of(),
            work_of(8, 8, prompt=64, completion=128, mini_batches=4),
            TINY,
            None,
        )
    )
    # 2 tables of 65,536; 2 layers of 49,152 attention, 320 norms, 1,024 router, 8 experts of 24,576; 128
    assert TINY.total == 131_072 + 2 * (49_152 + 320 + 1_024 + 196_608) + 128
    assert TINY.active == TINY.total - 2 * 6 * 24_576
    assert "0.625 M parameters, 0.330 M active" in text
    assert any(line.split() == ["weights", "1.2", "MiB"] for line in text.splitlines())  # 2 bytes a parameter
