"""The plan's own seconds against the run's timeouts, and the side passes that it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.config import FlipsConfig, GuardConfig, LearnerConfig
from gspo_dist.planner import plan
from gspo_dist.planner.text import format_plan
from gspo_dist.planner.throughput import ASSUMPTIONS, step_time
from gspo_dist.planner.timeouts import Timeout
from gspo_dist.planner.training import pass_s
from tests.unit.planner.views import H100, QWEN, engine_of, learner_of, run_of, work_of

LEARNER = learner_of(world_size=16, expert_parallel=8, token_budget=9216, recompute="full")
ENGINE = engine_of(engines=4, tensor_parallel=4, max_num_seqs=400)


def run(**changes):
    return replace(run_of(LEARNER, ENGINE, work_of(128, 16, mini_batches=4)), **changes)


def planned(config):
    return plan(config, QWEN, H100, nodes=4)


def test_every_timeout_is_compared_with_the_call_that_it_bounds() -> None:
    result = planned(run())
    found = {limit.knob: limit for limit in result.timeouts}
    # Sampling goes in slices, so rollout.timeout_s bounds no call that a plan could make long.
    assert list(found) == ["learner.timeout_s", "rollout.weight_sync.timeout_s"]
    assert found["learner.timeout_s"].predicted_s == result.step.train_s / 4  # a call is one mini-batch
    assert found["rollout.weight_sync.timeout_s"].predicted_s == result.step.sync_s
    assert [limit.allowed_s for limit in result.timeouts] == [1800.0, 600.0]
    assert result.fits
    assert not any(limit.fires or limit.close for limit in result.timeouts)


@pytest.mark.parametrize("knob", ["learner.timeout_s", "rollout.weight_sync.timeout_s"])
def test_a_timeout_that_would_fire_is_a_problem_with_its_way_out(knob) -> None:
    """Allowed is just below what is predicted; then just above it; then four times as much."""
    predicted = {limit.knob: limit.predicted_s for limit in planned(run()).timeouts}[knob]

    def with_limit(seconds: float):
        config = run()
        if knob == "learner.timeout_s":
            return replace(config, learner=replace(config.learner, timeout_s=seconds))
        sync = replace(config.rollout.weight_sync, timeout_s=seconds)
        return replace(config, rollout=replace(config.rollout, weight_sync=sync))

    result = planned(with_limit(0.99 * predicted))
    assert [p.split(" ")[0] for p in result.problems] == [knob]
    assert result.advice == (f"{knob}={4 * predicted:.0f}",)
    assert f"timeout {knob}: " in format_plan(result)
    assert "(would fire)" in format_plan(result)
    near = planned(with_limit(1.01 * predicted))
    assert near.fits
    assert "(near, since the plan is rough)" in format_plan(near)
    assert "(near" not in format_plan(planned(with_limit(4 * predicted)))


def test_a_timeout_fires_above_its_limit_and_is_close_from_half_of_it() -> None:
    assert [(t.fires, t.close) for t in (Timeout("k", "w", 10.0, s) for s in (10.1, 10.0, 5.1, 5.0))] == [
        (True, False),
        (False, True),
        (False, True),
        (False, False),
    ]


def test_side_passes_are_counted_in_tokens_by_hand() -> None:
    """Sequences of 4,608 tokens on average, 2,048 a step."""
    work = work_of(128, 16, mini_batches=4)
    assert work.guard_tokens == 0.0
    assert work.flip_tokens == 0.0
    probe = 4 * (512 + 512) / 10  # four prompts of 512 with 512 tokens each, every tenth sync
    assert work.probe_tokens == probe
    config = replace(
        work.run,
        objective=replace(
            work.run.objective,
            guard=GuardConfig(action="recentre", estimator="subset", subset_fraction=0.0625),
        ),
        flips=FlipsConfig(every=5, sequences=8),
    )
    work = replace(work, run=config)
    assert work.guard_tokens == 128 * 4608
    assert work.flip_tokens == 5 * 8 * 4608 / 5
    time = step_time(QWEN, LEARNER, ENGINE, work, H100, 400)
    passed = {"guard_s": 128, "flips_s": 8, "probe_s": probe / 4608}
    for name, sequences in passed.items():
        expected = pass_s(QWEN, LEARNER, work, H100, sequences, ASSUMPTIONS)
        assert getattr(time, name) == pytest.approx(expected, rel=1e-12)
    dense = replace(QWEN, num_experts=0, expert_layers=())
    assert step_time(dense, LEARNER, ENGINE, work, H100, 400).flips_s == 0.0


@pytest.mark.parametrize(
    ("old", "guard"),
    [
        ("recompute", GuardConfig(action="off", estimator="subset")),
        ("rollout", GuardConfig(action="warn", estimator="subset")),
        ("rollout", GuardConfig(action="recentre", estimator="batch")),
    ],
)
def test_a_guard_that_measures_no_subset_costs_nothing(old, guard) -> None:
    work = work_of(128, 16)
    objective = replace(work.run.objective, old_logprobs=old, guard=guard)
    assert replace(work, run=replace(work.run, objective=objective)).guard_tokens == 0.0


def test_the_budget_holds_the_longest_sequence_so_every_side_pass_fits_a_micro_batch() -> None:
    with pytest.raises(ValueError, match="token_budget must hold the longest sequence"):
        run(learner=LearnerConfig(token_budget=9215))


def test_a_pipeline_that_a_large_forward_budget_starves_is_compared_by_its_log_probs() -> None:
    """Eight stages with one micro-batch: each waits for the other seven, at eight times the tokens."""
    layout = learner_of(world_size=16, pipeline_parallel=8, expert_parallel=2, token_budget=9216)
    work = work_of(128, 16, mini_batches=4, old_logprobs="recompute")
    seconds = {}
    for budget in (None, 256 * 9216):
        learner = replace(layout, config=replace(layout.config, forward_token_budget=budget))
        result = planned(run_of(learner, ENGINE, work))
        (limit,) = (t for t in result.timeouts if t.knob == "learner.timeout_s")
        seconds[budget] = result.step.logprobs_s
        slow = budget is not None
        assert limit.what == ("a mini-batch's log-probs" if slow else "a mini-batch's update")
        assert limit.predicted_s == (result.step.logprobs_s if slow else result.step.train_s) / 4
    assert seconds[256 * 9216] > 2 * seconds[None]
