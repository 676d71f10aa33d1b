"""Group baselines against exact numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gspo_dist.objectives.advantages import (
    degenerate_group_share,
    group_advantages,
    position_advantages,
    turn_advantages,
)

GROUP_KINDS = ("group_std", "group_mean", "leave_one_out")


def test_worked_example():
    r, g = np.array([1.0, 0, 0, 0]), np.zeros(4, int)
    np.testing.assert_allclose(group_advantages(r, g, "group_mean"), [0.75, -0.25, -0.25, -0.25], rtol=1e-15)
    np.testing.assert_allclose(
        group_advantages(r, g, "leave_one_out"), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-15
    )
    root = math.sqrt(3)
    np.testing.assert_allclose(
        group_advantages(r, g, "group_std", eps=0.0), [root, -1 / root, -1 / root, -1 / root], rtol=1e-14
    )
    np.testing.assert_allclose(group_advantages(r, g, "none"), r)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_group_of_one_and_equal_rewards_have_exactly_zero_advantage(kind):
    # 0.1 three times has a float mean that is not 0.1: without the test on equality this would become +-1
    r = np.array([0.1, 0.1, 0.1, 7.0, 1 / 3, 1 / 3])
    g = np.array([4, 4, 4, 9, 2, 2])
    assert group_advantages(r, g, kind, eps=0.0).tolist() == [0.0] * 6
    assert degenerate_group_share(r, g) == 1.0


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_groups_are_independent_sum_to_zero_and_ignore_order(kind):
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(5) * 7 + 3, [2, 3, 8, 1, 4])
    r = rng.normal(size=18)
    a = group_advantages(r, g, kind)
    order = rng.permutation(18)
    np.testing.assert_allclose(group_advantages(r[order], g[order], kind), a[order], rtol=1e-12, atol=1e-15)
    for group in np.unique(g):
        np.testing.assert_allclose(
            a[g == group], group_advantages(r[g == group], g[g == group], kind), atol=1e-15
        )
        assert abs(a[g == group].sum()) < 1e-12
    shifted = group_advantages(r + 100.0, g, kind)
    np.testing.assert_allclose(shifted, a, atol=1e-10)


def test_population_std_has_unit_mean_square_whatever_the_group_size():
    for size in (2, 5, 64):
        r = np.random.default_rng(size).normal(size=size)
        a = group_advantages(r, np.zeros(size, int), "group_std", eps=0.0)
        assert (a * a).mean() == pytest.approx(1.0, rel=1e-12)
        sample = (r - r.mean()) / r.std(ddof=1)
        np.testing.assert_allclose(sample, a * math.sqrt((size - 1) / size), rtol=1e-12)


def test_the_share_of_groups_that_teach_nothing():
    """Group 0 is all right, group 2 has one rollout; group 1 is mixed."""
    rewards, groups = np.array([1, 1, 0, 1, 0.0]), np.array([0, 0, 1, 1, 2])
    assert degenerate_group_share(rewards, groups) == pytest.approx(2 / 3)


def test_eps_is_added_to_the_deviation():
    r, g = np.array([1.0, -1.0]), np.zeros(2, int)
    assert group_advantages(r, g, "group_std", eps=1.0).tolist() == [0.5, -0.5]
    assert group_advantages(r, g, "group_std").tolist() == pytest.approx(
        [1 / (1 + 1e-6), -1 / (1 + 1e-6)], rel=1e-15
    )
    with pytest.raises(ValueError, match="eps must be >= 0: got -1"):
        group_advantages(r, g, "group_std", eps=-1.0)


def test_leave_one_out_is_the_mean_of_the_others():
    r, g = np.array([3.0, -1.0, 0.5, 2.0]), np.array([1, 1, 1, 1])
    expected = [r[i] - np.delete(r, i).mean() for i in range(4)]
    np.testing.assert_allclose(group_advantages(r, g, "leave_one_out"), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("rewards", "groups", "kind", "message"),
    [
        ([1.0, 2.0], [0], "group_std", r"group_ids must be \[R=2\], one per reward: got \[1\]"),
        ([], [], "group_std", r"rewards must be \[R\] with R >= 1: got \[0\]"),
        ([[1.0]], [[0]], "group_std", r"rewards must be \[R\] with R >= 1: got \[1, 1\]"),
        ([1.0, math.nan], [0, 8], "group_std", "rewards must be finite.*rollout 1 of group 8"),
        ([1.0, 2.0], [0, 0], "group_sd", "advantage.*did you mean 'group_std'"),
    ],
)
def test_bad_advantage_inputs_name_the_field(rewards, groups, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(np.array(rewards), np.array(groups), kind)


# --- over the mean, over the batch, part by part ---


def test_maxrl_of_a_group_by_hand():
    """K = 1 of 4 solved: (1 - K/N) / (K/N) = 3, and -1 for the rest. K = 3 of 4: 1/3 and -1."""
    rewards, ids = np.array([0.0, 1.0, 0, 0, 1, 1, 1, 0, 0, 0]), np.array([5] * 4 + [6] * 4 + [7] * 2)
    got = group_advantages(rewards, ids, "maxrl", eps=0.0)
    assert got.tolist() == pytest.approx([-1, 3, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1, 0, 0], rel=1e-15)


def test_maxrl_refuses_a_reward_below_zero_and_names_it():
    with pytest.raises(ValueError, match=r"maxrl divides by the mean.*got -0\.5 for rollout 1 of group 3"):
        group_advantages(np.array([1.0, -0.5]), np.array([3, 3]), "maxrl")


def test_batch_std_scales_all_groups_by_one_number():
    """Centred: .5 -.5 | .75 -.25 -.25 -.25; the mean square is (.5 + .75) / 6, its root .456435."""
    rewards, ids = np.array([1.0, 0, 1, 0, 0, 0]), np.array([0, 0, 1, 1, 1, 1])
    got = group_advantages(rewards, ids, "batch_std", eps=0.0)
    assert got.tolist() == pytest.approx([x / 0.4564354646 for x in (0.5, -0.5, 0.75, -0.25, -0.25, -0.25)])
    assert np.mean(got**2) == pytest.approx(1.0)
    assert group_advantages(np.ones(4), np.array([0, 0, 1, 1]), "batch_std").tolist() == [0.0] * 4


def test_gdpo_normalises_each_part_apart_and_then_over_the_batch():
    """Two groups of two. Part a: +-1 in the first group, 0 in the second; part b: -+1 and +-1.

    With the weights 1 and 0.5 the sums are .5, -.5, .5, -.5, whose deviation is .5.
    """
    ids = np.array([0, 0, 1, 1])
    parts = np.array([[3.0, 0.0], [1.0, 0.2], [7.0, 9.0], [7.0, 8.0]])
    got = group_advantages(np.zeros(4), ids, "gdpo", eps=0.0, parts=parts, weights=[1.0, 0.5])
    assert got.tolist() == pytest.approx([1.0, -1.0, 1.0, -1.0], rel=1e-12)
    # Summed first, the small part of the second group would be lost in the large one of the first.
    summed = group_advantages(parts @ [1.0, 0.5], ids, "group_mean")
    assert summed.tolist() == pytest.approx([0.95, -0.95, 0.25, -0.25])
    same = group_advantages(np.zeros(4), ids, "gdpo", parts=np.ones((4, 2)), weights=[1.0, 1.0])
    assert same.tolist() == [0.0] * 4


def test_gdpo_of_one_part_is_group_std_over_its_deviation_in_the_batch():
    rewards, ids = np.array([1.0, 0, 0, 1, 1, 0, 2, 2]), np.array([0, 0, 0, 1, 1, 1, 2, 2])
    one = group_advantages(rewards, ids, "group_std")
    got = group_advantages(rewards, ids, "gdpo", parts=rewards[:, None], weights=[3.0])
    assert got == pytest.approx(one / np.sqrt(np.mean(one**2)), rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "gdpo"}, r"gdpo needs parts \[R=2, n\] and n weights, n >= 1: got \[0, 0\] and 0"),
        ({"kind": "gdpo", "parts": np.ones((2, 2)), "weights": [1.0]}, r"got \[2, 2\] and 1"),
        ({"kind": "gdpo", "parts": np.ones((2, 0))}, "at least one part"),
        ({"kind": "group_std", "parts": np.ones((2, 1)), "weights": [1.0]}, "for gdpo alone"),
    ],
)
def test_parts_are_for_gdpo_alone(kwargs, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(np.zeros(2), np.zeros(2), **kwargs)


# --- token by token ---


def test_what_is_paid_at_positions_goes_to_the_tokens_before_it():
    """Group 0 pays 1, 0 and 0.5: mean .5, deviation sqrt(1/6). Group 1 pays alike, and so nothing."""
    paid = [[(1, 1.0), (3, 0.0)], [(1, 0.5)], [(0, 2.0)], [(2, 2.0)]]
    ids = np.array([0, 0, 1, 1])
    got = position_advantages(paid, [4, 2, 1, 3], ids, "group_mean")
    assert [x.tolist() for x in got] == [[0.0, 0.0, -0.5, -0.5], [0.0, 0.0], [0.0], [0.0] * 3]
    scaled = position_advantages(paid, [4, 2, 1, 3], ids, "group_std", eps=0.0)
    assert scaled[0].tolist() == pytest.approx([0.0, 0.0, -(1.5**0.5), -(1.5**0.5)])


def test_one_payment_at_the_last_token_is_the_advantage_of_the_whole_completion():
    rewards, ids = np.array([1.0, 0, 0, 3, 3, 1]), np.array([0, 0, 0, 1, 1, 1])
    for kind in ("group_std", "group_mean"):
        paid = [[(n, r)] for n, r in enumerate(rewards)]
        got = position_advantages(paid, range(1, 7), ids, kind)
        whole = group_advantages(rewards, ids, kind)
        for n, (values, one) in enumerate(zip(got, whole, strict=True), 1):
            assert values.tolist() == [one] * n


def test_a_payment_beyond_its_completion_is_refused():
    with pytest.raises(ValueError, match=r"got 1\.0 at token 2 of 2 in rollout 0 of group 7"):
        position_advantages([[(2, 1.0)]], [2], np.array([7]), "group_mean")
    with pytest.raises(ValueError, match="advantage of positions must be a known name: got 'maxrl'"):
        position_advantages([[(1, 1.0)]], [2], np.array([7]), "maxrl")


# --- turn by turn ---


def rewards_of_turns(*episodes):
    return [np.array(own, float) for own in episodes]


def test_turns_by_hand():
    rewards = rewards_of_turns([1, 0], [0, 0])
    found = turn_advantages(rewards, np.zeros(2, int), "group_mean")
    assert [own.tolist() for own in found] == [[0.5, 0.0], [-0.5, 0.0]]
    found = turn_advantages(rewards_of_turns([0, 2, 1], [1], [0, 0]), np.zeros(3, int), "group_mean")
    # Worth from each turn on: (3, 3, 1), (1), (0, 0). A third turn has nobody to compare with.
    expected = [[5 / 3, 1.5, 0.0], [-1 / 3], [-4 / 3, -1.5]]
    for own, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [*GROUP_KINDS, "none"])
def test_where_all_is_paid_at_the_end_every_turn_has_the_episodes_advantage(kind):
    rng = np.random.default_rng(0)
    last, groups = rng.normal(size=8), np.repeat([4, 9], 4)
    turns = np.repeat([3, 5], 4)  # as many for siblings
    rewards = [np.array([0.0] * (n - 1) + [r]) for n, r in zip(turns, last, strict=True)]
    whole = group_advantages(last, groups, kind)
    for own, n, advantage in zip(turn_advantages(rewards, groups, kind), turns, whole, strict=True):
        np.testing.assert_allclose(own, np.full(n, advantage), rtol=1e-12)


def test_groups_of_turns_do_not_mix():
    rewards = rewards_of_turns([1, 0], [0, 0], [7, 7], [7, 7])
    found = turn_advantages(rewards, np.array([0, 0, 1, 1]), "group_mean")
    assert [own.tolist() for own in found] == [[0.5, 0.0], [-0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_an_episode_without_a_turn_is_refused():
    with pytest.raises(ValueError, match="every episode must have a turn"):
        turn_advantages(rewards_of_turns([1], []), np.zeros(2, int), "group_mean")
