"""Which rollouts of a batch train, and what a long completion costs."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.config import GuardConfig, ObjectiveConfig, SelectionConfig
from gspo_dist.objectives import get_objective
from gspo_dist.packing import pack
from gspo_dist.trainer.loop import prepare
from gspo_dist.trainer.selection import overlong_penalty, payments, select
from gspo_dist.trainer.setup.checks import name_selection
from gspo_dist.types import Turn
from tests.unit.trainer.small import rollout


def batch(rewards, *, size=2, tokens=None, finish=None, parts=None):
    """Groups of `size`, one rollout per reward; group ids count from 10."""
    return [
        rollout(
            i,
            group=10 + i // size,
            reward=reward,
            tokens=(5,) * (tokens[i] if tokens else 3),
            finish=finish[i] if finish else "stop",
            parts=parts[i] if parts else None,
        )
        for i, reward in enumerate(rewards)
    ]


def chosen(rollouts, advantage="group_mean", *, mini_batches=1, replicas=1, max_tokens=10, **knobs):
    config = ObjectiveConfig(selection=SelectionConfig(**knobs))
    return select(
        rollouts, config, advantage, max_tokens=max_tokens, mini_batches=mini_batches, replicas=replicas
    )


def test_by_default_everything_trains_with_the_advantages_of_its_group():
    rollouts = batch([1, 0, 1, 1])
    got = chosen(rollouts)
    assert got.advantages.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert got.trained == rollouts
    assert got.places.tolist() == [0, 1, 2, 3]
    assert got.metrics == {}


def test_the_zero_variance_filter_takes_groups_of_equal_rewards_out():
    rollouts = batch([1, 0, 1, 1, 0, 0, 0, 1])
    got = chosen(rollouts, degenerate="drop")
    assert got.places.tolist() == [0, 1, 6, 7]
    assert [r.rollout_id for r in got.trained] == [0, 1, 6, 7]
    assert got.metrics == {"selection/left_out_fraction": 0.5, "selection/filled_fraction": 0.0}


def test_a_scale_over_the_batch_does_not_see_what_was_filtered_out():
    """Centred .5 and -.5: their root mean square is .5 with the filter, and .5 / sqrt(2) without."""
    rollouts = batch([1, 0, 1, 1])
    with_filter = chosen(rollouts, "batch_std", degenerate="drop").advantages
    assert with_filter.tolist() == pytest.approx([1, -1, 0, 0], rel=1e-5)
    without = chosen(rollouts, "batch_std").advantages
    assert without.tolist() == pytest.approx([2**0.5, -(2**0.5), 0, 0], rel=1e-5)


def test_truncated_completions_do_not_train_but_count_in_their_groups_baseline():
    rollouts = batch([1, 0, 0, 1], finish=["stop", "length", "stop", "stop"])
    got = chosen(rollouts, mask_truncated=True)
    assert got.places.tolist() == [0, 2, 3]
    assert got.advantages.tolist() == [0.5, 0.0, -0.5, 0.5]
    assert got.metrics == {"selection/left_out_fraction": 0.25, "selection/filled_fraction": 0.0}


def test_a_batch_that_would_run_dry_gets_its_first_groups_back_without_an_advantage():
    rollouts = batch([1, 1, 0, 0, 1, 0], finish=["stop"] * 5 + ["length"])
    got = chosen(rollouts, degenerate="drop", mask_truncated=True, mini_batches=2)
    assert got.places.tolist() == [0, 1, 4]  # group 10 is back, group 12 has one that was not cut off
    assert got.advantages.tolist() == [0, 0, 0, 0, 0.5, 0]
    assert got.metrics["selection/filled_fraction"] == pytest.approx(2 / 6)
    # Two replicas need two rollouts in each mini-batch, whichever groups it gets.
    assert chosen(
        rollouts, degenerate="drop", mask_truncated=True, mini_batches=2, replicas=2
    ).places.tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen(batch([0, 0]), degenerate="drop").places.tolist() == [0, 1]


def test_the_overlong_penalty_is_that_of_the_paper():
    """L_max 20480 and a cache of 4096: 0 at 16384, a half at 18432, 1 at 20480 and beyond."""
    got = overlong_penalty(np.array([1, 16384, 18432, 20480, 30000]), 20480, 0.2)
    assert got.tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_the_penalty_enters_the_advantages_and_not_the_rewards():
    """10 tokens allowed, the last 4 are the buffer: 3 tokens cost nothing, 8 cost half."""
    rollouts = batch([1, 1], tokens=[3, 8])
    got = chosen(rollouts, overlong_penalty=2.0, overlong_buffer=0.4)
    assert got.advantages.tolist() == pytest.approx([0.5, -0.5])
    assert got.metrics["selection/overlong_penalty_mean"] == pytest.approx(0.5)
    assert [r.reward for r in got.trained] == [1, 1]
    assert chosen(rollouts, overlong_penalty=0.0, overlong_buffer=0.4).advantages.tolist() == [0, 0]


def test_a_group_is_degenerate_by_its_judged_rewards_whatever_its_lengths():
    rollouts = batch([1, 1, 1, 0], tokens=[3, 8, 3, 3])
    got = chosen(rollouts, degenerate="drop", overlong_penalty=2.0, overlong_buffer=0.4)
    assert got.places.tolist() == [2, 3]


def test_gdpo_reads_its_parts_from_the_rewards():
    parts = [{"right": 1.0, "shape": 0.0}, {"right": 0.0}, {"right": 1.0, "shape": 1.0}, {"right": 1.0}]
    config = ObjectiveConfig(advantage="gdpo", reward_parts={"right": 1, "shape": 0.5})
    rollouts = batch([1, 0, 1, 1], parts=parts)
    got = select(rollouts, config, "gdpo", max_tokens=10, mini_batches=1, replicas=1)
    # Sums 1, -1, .5, -.5 have the deviation .790569.
    assert got.advantages.tolist() == pytest.approx([1 / 0.790569, -1 / 0.790569, 0.632456, -0.632456], 1e-4)
    wrong = replace(config, reward_parts={"rght": 1})
    with pytest.raises(ValueError, match=r"got 'rght', and this batch has \['right', 'shape'\]"):
        select(rollouts, wrong, "gdpo", max_tokens=10, mini_batches=1, replicas=1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"advantage": "gdpo"}, "reward_parts: got advantage gdpo and {}"),
        ({"reward_parts": {"right": 1}}, "nothing else reads objective.reward_parts: got .* group_std"),
    ],
)
def test_gdpo_and_its_parts_go_together(knobs, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**knobs)


@pytest.mark.parametrize(
    ("advantage", "message"),
    [("gdpo", "normalises the parts of a reward"), ("maxrl", "no reward may fall below 0")],
)
def test_a_penalty_that_an_estimator_cannot_take_is_refused(advantage, message):
    """gdpo would leave it out in silence, and maxrl stop in the step of the first long wrong answer."""
    parts = {"right": 1.0} if advantage == "gdpo" else {}
    with pytest.raises(ValueError, match=rf"overlong_penalty .* {message}.*: got 0\.5; set it to 0"):
        ObjectiveConfig(
            name="reinforce",
            advantage=advantage,
            old_logprobs="recompute",
            guard=GuardConfig(action="off"),
            reward_parts=parts,
            selection=SelectionConfig(overlong_penalty=0.5),
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"degenerate": "refil"}, "objective.selection.degenerate.*did you mean 'refill'"),
        ({"over_asked": -1}, "objective.selection.over_asked must be at least 0: got -1"),
        ({"tries": 0}, "objective.selection.tries must be at least 1: got 0"),
        ({"overlong_penalty": -1.0}, "overlong_penalty must be at least 0"),
        ({"overlong_buffer": 0.0}, r"overlong_buffer must be a share in \(0, 1\]: got 0"),
        ({"mask_truncated": "yes"}, "mask_truncated must be true or false: got 'yes'"),
    ],
)
def test_bad_selections_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**knobs)


# --- objective=dapo ---


def test_objective_dapo_is_the_whole_recipe_and_dapo_loss_its_loss(caplog):
    whole, loss = (run_config([f"objective={name}"]) for name in ("dapo", "dapo_loss"))
    assert whole.objective.selection == SelectionConfig("refill", None, 10, True, 1.0, 0.2)
    assert loss.objective.selection == SelectionConfig()
    assert replace(whole.objective, selection=SelectionConfig()) == loss.objective
    with caplog.at_level(logging.WARNING):
        name_selection(loss)
        assert not caplog.messages
        name_selection(whole)
    assert caplog.messages == [
        "objective.selection (dapo): dynamic sampling: 128 groups are asked for, the first 64 whose rewards "
        "differ train, 10 tries at most",
        "objective.selection (dapo): completions cut off at the token limit are not trained on",
        "objective.selection (dapo): overlong penalty: up to 1 in the last 20% of the token limit",
    ]


# --- advantages by token ---


def test_a_reward_pays_at_positions_and_every_token_gets_its_own_advantage():
    """Paid 1 at token 0 and 0 at token 2, and .5 at the end of a sibling that names no position: mean .5."""
    rollouts = batch([1, 0.5], parts=[{"step@0": 1.0, "end@2": 0.0, "right": 9.0}, {"right": 0.5}])
    config = ObjectiveConfig(name="gspo_token", credit="position", advantage="group_mean")
    got = select(rollouts, config, "group_mean", max_tokens=10, mini_batches=1, replicas=1)
    assert [x.tolist() for x in got.given] == [[0.0, -0.5, -0.5], [0.0, 0.0, 0.0]]
    assert got.advantages.tolist() == pytest.approx([-1 / 3, 0])
    (mini,) = pack(
        got.trained,
        got.given,
        replicas=1,
        token_budget=64,
        mini_batches=1,
        max_completion_length=8,
        seed=(0, 0),
    )
    (packed_batch,) = mini.batches()
    assert sorted(packed_batch.advantages.tolist()) == [-0.5, -0.5, *[0.0] * 8]
    first = packed_batch.rollout_index.tolist().index(0)
    assert packed_batch.advantages[packed_batch.rows(first)].tolist() == [0.0, 0.0, 0.0, -0.5, -0.5]


def test_a_rollout_that_is_left_out_has_no_advantage_at_any_token():
    rollouts = batch([1, 0], finish=["length", "length"], parts=[{"a@0": 1.0}, {"a@1": 0.0}])
    config = ObjectiveConfig(name="grpo", credit="position", selection=SelectionConfig(mask_truncated=True))
    assert select(rollouts, config, "group_std", max_tokens=3, mini_batches=1, replicas=1).given == [0.0, 0.0]


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        ("position", [2 / 3, -2 / 3]),  # paid 1, and 1 and -1: their mean is 1/3
        ("turn", [0.5, -0.5]),  # the last turns are worth 1 and 0
    ],
)
def test_the_overlong_penalty_is_taken_whatever_the_credit(credit, expected):
    """10 tokens allowed, the last 4 are the buffer: 8 tokens cost half of 2."""
    rollouts = [
        replace(r, completion=replace(r.completion, turns=(Turn(0, 0, 0), Turn(0, n, n))))
        for r in batch([1, 1], tokens=[3, 8])
        for n in [len(r.completion)]
    ]
    penalty = SelectionConfig(overlong_penalty=2.0, overlong_buffer=0.4)
    config = ObjectiveConfig(name="grpo", credit=credit, advantage="group_mean", selection=penalty)
    got = select(rollouts, config, "group_mean", max_tokens=10, mini_batches=1, replicas=1)
    assert [sorted(set(x.tolist())) for x in got.given] == [pytest.approx([x]) for x in expected]
    assert got.advantages.tolist() == pytest.approx(expected)


def test_the_overlong_penalty_is_paid_at_the_last_token():
    assert payments(batch([2.0])[0], -0.5) == [(2, 2.0), (2, -0.5)]
    assert payments(batch([2.0], parts=[{"a@1": 1.0}])[0]) == [(1, 1.0)]
    named = {"mail@home": 1.0, "1": 1.0}  # parts that only look like it
    assert payments(batch([2.0], parts=[named])[0]) == [(2, 2.0)]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "gspo", "credit": "position"}, "gspo has one per sequence .* use one of gspo_token, grpo"),
        ({"name": "grpo", "credit": "position", "advantage": "maxrl"}, "got advantage maxrl; use group_std"),
        ({"credit": "token"}, "objective.credit must be a known name: got 'token'"),
    ],
)
def test_credit_that_means_nothing_is_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**knobs)


def test_a_step_charges_length_by_its_own_limit():
    """Four tokens are the limit of step 1, and half of that of step 2, where the buffer only begins."""
    config = run_config(
        [
            "rollout.max_completion_tokens=8",
            "rollout.length_schedule=[[1, 4], [2, 8]]",
            "objective.selection={overlong_penalty: 1.0, overlong_buffer: 0.5}",
            "mini_batches=1",
            "rollout.max_prompt_tokens=16",
            "learner.token_budget=64",
            "learner.world_size=1",
        ]
    )
    run = SimpleNamespace(config=config, objective=get_objective("gspo"))
    rollouts = batch([1, 0], tokens=[4, 4])
    for step, penalty in ((1, 1.0), (2, 0.0)):
        selected, (mini,) = prepare(run, rollouts, step)
        assert selected.metrics["selection/overlong_penalty_mean"] == penalty
        assert mini.denominators.max_completion_length == 8  # dr_grpo's constant stays


@pytest.mark.parametrize("degenerate", ["drop", "refill"])
def test_groups_of_one_cannot_be_told_apart(degenerate):
    words = [
        "rollout.group_size=1",
        "objective.advantage=none",
        f"objective.selection.degenerate={degenerate}",
    ]
    with pytest.raises(ValueError, match=rf"degenerate={degenerate} leaves out .* got rollout\.group_size 1"):
        run_config(words)
