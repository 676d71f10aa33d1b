"""Dynamic sampling: which of the groups that were asked for train, and when a step gives up."""

from __future__ import annotations

import pytest

from gspo_dist.config import SelectionConfig
from gspo_dist.metrics.names import metric_of
from gspo_dist.trainer.refill import NothingToLearn, Refill
from tests.unit.trainer.test_selection import batch


def test_the_first_groups_by_id_whose_rewards_differ_train():
    refill = Refill(SelectionConfig(degenerate="refill", over_asked=3), prompts_per_step=2)
    assert (refill.asked, refill.ids_per_step) == (5, 50)
    rollouts = batch([1, 1, 0, 1, 0, 0, 1, 0, 0, 1])
    got = refill.choose(rollouts, tries=1, step=1)
    assert [r.group_id for r in got] == [11, 11, 13, 13]
    assert refill.told == {
        "selection/tries": 1.0,
        "selection/asked_groups": 5.0,
        "selection/asked_degenerate_fraction": 0.4,
        "selection/asked_reward_mean": 0.5,
    }
    assert all(metric_of(key) for key in refill.told)


def test_too_few_groups_that_teach_ask_again_and_stop_after_the_last_try_with_the_solve_rates():
    refill = Refill(SelectionConfig(degenerate="refill", tries=3), prompts_per_step=2)
    rollouts = batch([1, 1, 0, 0, 0, 1, 1, 1])
    assert refill.choose(rollouts, tries=2, step=7) is None
    with pytest.raises(NothingToLearn) as error:
        refill.choose(rollouts, tries=3, step=7)
    assert "step 7 got 1 of 4 in 3 tries" in str(error.value)
    assert "(mean reward of a group: groups with it: 0.00: 1, 0.50: 1, 1.00: 2)" in str(error.value)
    assert "set degenerate=drop" in str(error.value)


def test_without_refill_a_step_keeps_all_its_groups_and_the_ids_of_before():
    refill = Refill(SelectionConfig(degenerate="drop"), prompts_per_step=4)
    assert (refill.asked, refill.ids_per_step) == (4, 4)
    rollouts = batch([1, 1])
    assert refill.choose(rollouts, tries=1, step=1) == rollouts
    assert refill.told == {}


def test_as_many_groups_as_are_needed_are_enough_also_in_the_first_try():
    """Two tries are allowed: the boundary is the number of groups, not of tries."""
    refill = Refill(SelectionConfig(degenerate="refill", tries=2), prompts_per_step=2)
    rollouts = batch([1, 0, 0, 1])
    assert refill.choose(rollouts, tries=1, step=1) == rollouts
    assert refill.choose(batch([1, 0, 1, 1]), tries=1, step=1) is None
    assert refill.told["selection/asked_degenerate_fraction"] == 0.0
