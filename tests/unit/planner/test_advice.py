"""The advice makes a run fit, and the run accepts what is advised."""

from __future__ import annotations

from gspo_dist.planner import (
    LearnerLayout,
    find_gpu,
)
from gspo_dist.planner.advice import learner_steps
from gspo_dist.planner.memory import learner_memory
from tests.unit.planner.views import (
    ENGINE,
    H100,
    LEARNER,
    QWEN,
    WORK,
    change,
    learner_of,
    plan_of,
    work_of,
)


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


def test_forward_passes_that_are_too_large_are_told_to_shrink_first() -> None:
    wide = change(LEARNER, forward_token_budget=40 * LEARNER.token_budget)
    assert next(learner_steps(wide, WORK, 8)) == ("learner.forward_token_budget=null", LEARNER)
    result = plan_of(wide, ENGINE, WORK, QWEN, H100, nodes=4)
    assert "learner: a rank lacks" in result.problems[0]
    assert result.advice == ("learner: learner.forward_token_budget=null",)
    assert "forward_token_budget" not in next(learner_steps(LEARNER, WORK, 8))[0]


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
