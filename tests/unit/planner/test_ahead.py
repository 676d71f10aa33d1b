"""What a plan says of rollouts begun ahead: its numbers as a machine, the table, the best split."""

from __future__ import annotations

import pytest

from gspo_dist.planner import format_plan
from gspo_dist.planner.ahead import (
    SHOWN,
    draw,
    look_ahead,
    machine_of,
    steps_needed,
    steps_of,
    thinned,
    thinning,
)
from gspo_dist.planner.pipeline import Lengths, simulate
from gspo_dist.planner.throughput import ASSUMPTIONS, decode_step_s, step_time
from tests.unit.planner.views import ENGINE, H100, LEARNER, QWEN, change, plan_of, work_of

WORK = work_of(8, 4, prompt=1024, completion=4096)
LENGTHS = Lengths(2048, 0.8, 4096)


def look(learner=LEARNER, engine=ENGINE, work=WORK, ahead=1, allowed=lambda a, b: True):
    return look_ahead(
        QWEN, learner, engine, work, H100, 64, ASSUMPTIONS, LENGTHS, steps_ahead=ahead, allowed=allowed
    )


def test_a_machine_is_made_of_the_planners_own_numbers():
    time = step_time(QWEN, LEARNER, ENGINE, WORK, H100, 48, ASSUMPTIONS)
    m = machine_of(QWEN, ENGINE, WORK, H100, 48, time, ASSUMPTIONS)
    assert (m.engines, m.places, m.colocated) == (8, 48, False)
    assert m.learn_s == time.logprobs_s + time.train_s + time.side_s + time.driver_s
    assert m.publish_s == time.sync_s
    assert m.step_s[17] == decode_step_s(QWEN, ENGINE, H100, 17, 512 + WORK.lengths.half_way, ASSUMPTIONS)
    assert len(m.step_s) == 49
    assert m.prompt_tokens == 512
    # Reading a token costs its forward pass at the rate that decoding reaches: 0.35 of two GPUs' 989 TFLOP/s.
    read = QWEN.forward_flops(1, 512 + WORK.lengths.half_way)
    assert m.prefill_s == pytest.approx(read / (2 * 989e12 * 0.35), rel=1e-12)
    few = machine_of(QWEN, change(ENGINE, max_num_seqs=8), WORK, H100, 48, time, ASSUMPTIONS)
    assert few.places == 8


def test_every_k_is_simulated_on_the_same_lengths():
    found = look()
    assert tuple(o.steps_ahead for o in found.outcomes) == SHOWN
    seconds = [o.step_s for o in found.outcomes]
    assert seconds[0] > 1.2 * seconds[1]
    assert seconds[1] > seconds[2]
    assert all(o.staleness_max <= o.steps_ahead for o in found.outcomes)
    time = step_time(QWEN, LEARNER, ENGINE, WORK, H100, 64, ASSUMPTIONS)
    groups = draw(LENGTHS, WORK, steps_needed(WORK, 1))
    again = steps_of(machine_of(QWEN, ENGINE, WORK, H100, 64, time, ASSUMPTIONS), groups, WORK, 1)
    assert again == found.outcomes[1]


def test_splits_use_all_gpus_and_the_fastest_comes_first():
    found = look()
    total = LEARNER.world_size + ENGINE.engines * ENGINE.tensor_parallel
    assert len(found.splits) > 1
    assert all(s.ranks + s.engines * ENGINE.tensor_parallel == total for s in found.splits)
    assert [s.step_s for s in found.splits] == sorted(s.step_s for s in found.splits)
    own = next(s for s in found.splits if (s.ranks, s.engines) == (16, 8))
    assert own.step_s == found.outcomes[1].step_s
    # tensor 2 and experts over 8 ranks: only whole multiples of 8 ranks are legal
    assert {s.ranks % 8 for s in found.splits} == {0}


def test_splits_are_compared_at_the_runs_own_k_and_only_where_they_are_allowed():
    at_three = look(ahead=3)
    assert at_three.split_at == 3
    own = next(s for s in at_three.splits if s.ranks == 16)
    assert own.step_s == at_three.outcomes[3].step_s
    assert look(ahead=0).split_at == 1
    assert [s.ranks for s in look(allowed=lambda learner, engine: engine.engines == 8).splits] == [16]


def test_a_run_that_begins_more_steps_ahead_is_compared_with_itself():
    """Its own K has a row of the table, and the split that it has is timed at that K."""
    found = look(ahead=6)
    assert [o.steps_ahead for o in found.outcomes] == [*SHOWN, 6]
    own = next(s for s in found.splits if s.ranks == LEARNER.world_size)
    assert found.split_at == 6
    assert own.step_s == found.outcomes[-1].step_s


def test_colocated_engines_have_no_split():
    assert look(engine=change(ENGINE, colocated=True)).splits == ()


def test_a_plan_shows_the_table_and_names_the_best_split():
    result = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4, ahead=True)
    text = format_plan(result)
    assert "mean 2,048, spread 0.8, cut at 4,096" in text
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0] in "01234"]
    assert [row[0] for row in rows[-5:]] == ["0", "1", "2", "3", "4"]
    assert rows[-5][2] == "1.00x"
    best = result.ahead.splits[0]
    assert f"learner.world_size={best.ranks} rollout.engines={best.engines}, {best.step_s:.0f} s" in text


def test_a_split_that_does_not_fit_or_starves_a_replica_is_not_named():
    """Micro-batches of 65,536 tokens fit 16 ranks and not 8. Eight rollouts feed 8 replicas and not 12."""

    def ranks(learner, work):
        return {s.ranks for s in plan_of(learner, ENGINE, work, QWEN, H100, nodes=4, ahead=True).ahead.splits}

    assert ranks(LEARNER, WORK) == {8, 16, 24}
    assert ranks(change(LEARNER, token_budget=65536), WORK) == {16, 24}
    few = work_of(2, 4, prompt=1024, completion=4096)
    assert ranks(LEARNER, few) == {8, 16}


def test_measured_lengths_replace_the_assumed_ones():
    measured = Lengths(1024, 0.3, 4096)
    result = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4, lengths=measured, ahead=True)
    assert result.ahead.lengths == measured
    assumed = plan_of(LEARNER, ENGINE, WORK, QWEN, H100, nodes=4, ahead=True)
    assert result.step.tokens == 32 * (256 + 1024)  # prompts fill as much of their limit
    assert result.step.train_s < 0.9 * assumed.step.train_s
    assert result.ahead.outcomes[0].step_s < 0.7 * assumed.ahead.outcomes[0].step_s


def test_large_steps_are_thinned_and_small_ones_are_not():
    """One rollout stands for eight: an eighth of the groups and places, the same seconds within 10%."""
    assert thinning(WORK, 8) == 1
    large = work_of(256, 16, prompt=1024, completion=4096)
    assert thinning(large, 4) == 8
    assert thinning(large, 32) == 2  # every engine keeps four groups
    assert thinning(work_of(255, 16), 4) == 1
    time = step_time(QWEN, LEARNER, ENGINE, large, H100, 512, ASSUMPTIONS)
    machine = machine_of(QWEN, ENGINE, large, H100, 512, time, ASSUMPTIONS)
    thin = thinned(machine, 8)
    assert (thin.places, thin.step_s[3], thin.prefill_s) == (64, machine.step_s[24], 8 * machine.prefill_s)
    groups = draw(LENGTHS, large, steps_needed(large, 1))
    whole = simulate(machine, groups[: 256 * steps_needed(large, 1)], 256, 1, warm_up=2, cool_down=1)
    assert steps_of(machine, groups, large, 1).step_s == pytest.approx(whole.step_s, rel=0.1)


def test_a_run_that_does_not_fit_is_not_simulated():
    assert (
        plan_of(change(LEARNER, recompute="none"), ENGINE, WORK, QWEN, H100, nodes=1, ahead=True).ahead
        is None
    )
