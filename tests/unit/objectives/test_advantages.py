"""Group baselines against exact numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gspo_dist.objectives.advantages import degenerate_group_share, group_advantages

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
