"""The two passes over a block: merged blocks are the whole, compiled is chunked."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.learners.head.logprobs import taken_logprobs
from gspo_dist.learners.head.passes import Block, Chunked, SoftmaxState

LOGITS = [[0.0, 1.0, 2.0, 5.0, -3.0], [9.0, 8.0, 7.0, -1.0, 0.5]]


def state(n: int) -> SoftmaxState:
    zeros = torch.zeros(n, dtype=torch.float64)
    return SoftmaxState(zeros - 1e30, zeros.clone(), zeros.clone(), zeros - torch.inf)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_two_merged_blocks_are_the_softmax_of_both(cut: int) -> None:
    """With bias 0.5 everywhere and temperature 2: x = (logits + 0.5) / 2."""
    logits, ids = torch.tensor(LOGITS, dtype=torch.float64), torch.tensor([3, 0])
    x = (logits + 0.5) / 2
    got, passes = state(2), Chunked(upcast=False)
    for start, stop in ((0, cut), (cut, 5)):
        part = logits[:, start:stop].clone()
        passes.merge(Block(part, torch.full_like(part[0], 0.5), ids - start, 0.5), got, with_entropy=True)
    logp = x.log_softmax(-1)
    torch.testing.assert_close(got.peak, x.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(got.peak + got.total.log(), x.logsumexp(1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.taken, x[[0, 1], ids], rtol=0, atol=0)
    entropy = -(logp.exp() * logp).sum(1)
    torch.testing.assert_close(got.total.log() - got.dot / got.total, entropy, rtol=1e-13, atol=1e-13)


def test_the_gradient_of_a_block_is_taken_minus_probability() -> None:
    """Two tokens, one in the block and one in another; upstream 2 and -3: 2 (1 - p) and -3 (0 - p)."""
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    p = logits.softmax(-1)
    scale = torch.tensor([2.0, -3.0], dtype=torch.float64)
    block = Block(logits[:, 2:4].clone(), None, torch.tensor([1, -2]), 1.0)
    got = Chunked(upcast=False).gradient(block, logits.logsumexp(1), scale, torch.float64)
    want = torch.stack([2 * (torch.tensor([0.0, 1.0]) - p[0, 2:4]), 3 * p[1, 2:4]])
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 3.0])
def test_compiled_equals_chunked(cap: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g).requires_grad_() for s in ((7, 5), (23, 5), (23,)))
    ids, upstream = torch.randint(23, (7,), generator=g), torch.randn(7, generator=g)
    outs = [
        taken_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            temperature=0.7,
            logit_softcap=cap,
            chunk_tokens=8,
            implementation=name,
        )
        for name in ("compiled", "chunked")
    ]
    torch.testing.assert_close(outs[0].logprobs, outs[1].logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(outs[0].entropy, outs[1].entropy, rtol=2e-6, atol=2e-6)
    got, want = (torch.autograd.grad((o.logprobs * upstream).sum(), [hidden, weight, bias]) for o in outs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=2e-6)
