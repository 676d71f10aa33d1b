"""KL estimators: the value and the gradient that their docstring states, by enumeration of a vocabulary."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.objectives.kl import KL


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
