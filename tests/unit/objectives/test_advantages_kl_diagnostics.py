"""Group baselines, KL estimators and batch diagnostics, against exact numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gspo_dist.objectives.advantages import degenerate_group_share, group_advantages
from gspo_dist.objectives.diagnostics import advantage_statistics, length_by_outcome, ratio_quantiles
from gspo_dist.objectives.kl import KL

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
    np.testing.assert_allclose(
        group_advantages(r, g, "group_std", std="sample", eps=0.0), [1.5, -0.5, -0.5, -0.5], rtol=1e-14
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
        b = group_advantages(r, np.zeros(size, int), "group_std", std="sample", eps=0.0)
        np.testing.assert_allclose(b, a * math.sqrt((size - 1) / size), rtol=1e-12)


def test_leave_one_out_is_the_mean_of_the_others():
    r, g = np.array([3.0, -1.0, 0.5, 2.0]), np.array([1, 1, 1, 1])
    expected = [r[i] - np.delete(r, i).mean() for i in range(4)]
    np.testing.assert_allclose(group_advantages(r, g, "leave_one_out"), expected, rtol=1e-14)


def test_tensors_come_back_as_tensors_of_the_same_dtype():
    r, g = torch.tensor([1.0, 0.0], dtype=torch.float32), torch.tensor([5, 5])
    a = group_advantages(r, g, "group_mean")
    assert a.dtype == torch.float32
    assert a.tolist() == [0.5, -0.5]
    assert group_advantages(torch.tensor([1, 0]), g, "group_mean").tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("rewards", "groups", "kind", "message"),
    [
        ([1.0, 2.0], [0], "group_std", "group_ids"),
        ([], [], "group_std", "rewards"),
        ([1.0, math.nan], [0, 8], "group_std", "rewards must be finite.*rollout 1 of group 8"),
        ([1.0, 2.0], [0, 0], "group_sd", "advantage.*did you mean 'group_std'"),
    ],
)
def test_bad_advantage_inputs_name_the_field(rewards, groups, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(np.array(rewards), np.array(groups), kind)


def _exact(logits: torch.Tensor, ref: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected value and expected gradient of the estimator by enumeration of the vocabulary."""
    logits = logits.clone().requires_grad_()
    logp = torch.log_softmax(logits, -1)
    values = KL[estimator](logp, torch.log_softmax(ref, -1))
    p = logp.exp().detach()
    (grad,) = torch.autograd.grad((p * values).sum(), logits)
    return (p * values).sum().detach(), grad


def test_kl_estimators_have_the_value_and_the_gradient_that_their_docstring_states():
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(12, generator=rng, dtype=torch.float64)
    ref = logits + 0.4 * torch.randn(12, generator=rng, dtype=torch.float64)
    theta = logits.clone().requires_grad_()
    log_pi, log_ref = torch.log_softmax(theta, -1), torch.log_softmax(ref, -1)
    reverse = (log_pi.exp() * (log_pi - log_ref)).sum()
    forward = (log_ref.exp() * (log_ref - log_pi)).sum()
    (reverse_grad,) = torch.autograd.grad(reverse, theta, retain_graph=True)
    (forward_grad,) = torch.autograd.grad(forward, theta)
    value = {name: _exact(logits, ref, name) for name in KL}
    assert value["k1"][0].item() == pytest.approx(reverse.item(), rel=1e-12)
    assert value["k3"][0].item() == pytest.approx(reverse.item(), rel=1e-12)
    assert abs(value["k2"][0].item() - reverse.item()) > 1e-3  # biased
    assert value["k1"][1].abs().max().item() < 1e-15
    torch.testing.assert_close(value["k2"][1], reverse_grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(value["k3"][1], forward_grad, rtol=1e-12, atol=1e-15)


def test_k3_is_exact_near_zero_and_finite_far_away():
    ref = torch.tensor([0.0, 0.0], dtype=torch.float64)
    assert KL["k3"](torch.tensor([1e-8, -1e-8], dtype=torch.float64), ref) == pytest.approx(5e-17, rel=1e-6)
    assert torch.isfinite(KL["k3"](torch.tensor([-800.0]), torch.tensor([0.0]))).all()


def test_diagnostics_on_numbers_done_by_hand():
    stats = advantage_statistics(np.array([1.0, -1.0, 0.0, 2.0]))
    assert stats["advantage/mean"] == 0.5
    assert stats["advantage/std"] == pytest.approx(math.sqrt(1.25))
    assert (stats["advantage/positive_fraction"], stats["advantage/negative_fraction"]) == (0.5, 0.25)
    assert (stats["advantage/zero_fraction"], stats["advantage/min"], stats["advantage/max"]) == (
        0.25,
        -1.0,
        2.0,
    )
    q = ratio_quantiles(np.arange(101.0), (0.0, 0.1, 0.5, 1.0))
    assert q == {"ratio/q0": 0.0, "ratio/q10": 10.0, "ratio/q50": 50.0, "ratio/q100": 100.0}
    lengths = length_by_outcome(np.array([10, 20, 60]), np.array([True, True, False]))
    assert lengths["rollout/length_correct_tokens"] == 15
    assert lengths["rollout/length_wrong_tokens"] == 60
    assert lengths["rollout/correct_fraction"] == pytest.approx(2 / 3)
    assert math.isnan(length_by_outcome(np.array([3]), np.array([True]))["rollout/length_wrong_tokens"])
    assert degenerate_group_share(np.array([1, 1, 0, 1, 0.0]), np.array([0, 0, 1, 1, 2])) == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantage_statistics(np.array([])), "advantages"),
        (lambda: ratio_quantiles(np.ones(3), (1.5,)), "quantiles"),
        (lambda: length_by_outcome(np.ones(2), np.array([1, 0])), "correct must be bool"),
    ],
)
def test_bad_diagnostic_inputs_name_the_field(call, message):
    with pytest.raises(ValueError, match=message):
        call()
