"""Log-probs of tokens beside the taken one are those of the whole log-softmax, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.learners.head import others
from gspo_dist.learners.head.logprobs import taken_logprobs
from gspo_dist.learners.head.others import other_logprobs


def test_two_logits_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0], [math.log(3), 9.0]])
    taken = torch.tensor([1])
    logprobs = taken_logprobs(hidden, weight, taken).logprobs
    found = other_logprobs(hidden, weight, taken, logprobs, torch.tensor([[0, 1]]))
    assert found[0].exp().tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("block", [others.GATHERED_BYTES, 4 * 4 * 8 * 2], ids=["one block", "two at once"])
@pytest.mark.parametrize(
    "head",
    [{}, {"temperature": 0.7, "logit_scale": 0.3}, {"logit_softcap": 2.0, "temperature": 1.5}],
    ids=["plain", "scaled", "capped"],
)
def test_they_are_the_whole_log_softmax(monkeypatch, head, block):
    monkeypatch.setattr(others, "GATHERED_BYTES", block)
    rng = torch.Generator().manual_seed(0)
    n, h, v = 5, 8, 11
    hidden, weight, bias = (
        torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()
        for shape in ((n, h), (v, h), (v,))
    )
    taken = torch.randint(0, v, (n,), generator=rng)
    ids = torch.randint(0, v, (n, 3), generator=rng)
    ids[0] = taken[0]  # the taken token may be among them, and more than once
    pull = torch.randn(n, 3, generator=rng, dtype=torch.float64)

    def grads(found):
        return torch.autograd.grad((found * pull).sum(), (hidden, weight, bias))

    logprobs = taken_logprobs(hidden, weight, taken, bias=bias, **head).logprobs
    found = other_logprobs(hidden, weight, taken, logprobs, ids, bias=bias, **head)
    x = (hidden @ weight.T + bias) * head.get("logit_scale", 1.0)
    cap = head.get("logit_softcap")
    x = x if cap is None else cap * torch.tanh(x / cap)
    wanted = (x / head.get("temperature", 1.0)).log_softmax(-1).gather(1, ids)
    assert (found - wanted).abs().max() < 1e-12
    for a, b in zip(grads(found), grads(wanted), strict=True):
        assert (a - b).abs().max() < 1e-12
