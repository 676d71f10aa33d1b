"""Laws of the log-probs head: it is log_softmax + gather, in value and gradient, whatever the blocks."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gspo_dist.learners.head.logprobs import _block_columns, taken_logprobs

N, H, V = 7, 5, 23


def make(
    n: int = N, h: int = H, v: int = V, dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0
):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    ids = torch.randint(v, (n,), generator=g)
    upstream = torch.randn(n, generator=g, dtype=torch.float64)
    return hidden, weight, b, ids, upstream


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float = 1.0):
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach()


def gradients(logprobs: Tensor, upstream: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad((logprobs * upstream).sum(), [t for t in inputs if t is not None]))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 5, N, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kept_bytes", [0, 8 * N * V // 2, 1 << 30], ids=["kept-none", "kept-half", "kept-all"]
)
def test_equals_log_softmax_and_gather_in_value_and_gradient(chunk_tokens, temperature, bias, kept_bytes):
    hidden, weight, b, ids, upstream = make(bias=bias)
    out = taken_logprobs(
        hidden, weight, ids, bias=b, temperature=temperature, chunk_tokens=chunk_tokens, kept_bytes=kept_bytes
    )
    expected, entropy = naive(hidden, weight, b, ids, temperature)
    assert_close(out.logprobs, expected, 1e-12)
    assert_close(out.entropy, entropy, 1e-12)
    for got, want in zip(
        gradients(out.logprobs, upstream, hidden, weight, b),
        gradients(expected, upstream, hidden, weight, b),
        strict=True,
    ):
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["kept-none", "kept-all"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [2, None])
def test_scaled_and_capped_logits_in_value_and_gradient(chunk_tokens, softcap, kept_bytes):
    hidden, weight, b, ids, upstream = make()
    out = taken_logprobs(
        hidden,
        weight,
        ids,
        bias=b,
        temperature=0.7,
        logit_scale=0.3,
        logit_softcap=softcap,
        chunk_tokens=chunk_tokens,
        kept_bytes=kept_bytes,
    )
    logits = 0.3 * torch.nn.functional.linear(hidden, weight, b)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / 0.7).log_softmax(-1)
    expected = logp.gather(1, ids[:, None])[:, 0]
    assert_close(out.logprobs, expected, 1e-12)
    assert_close(out.entropy, -(logp.exp() * logp).sum(-1).detach(), 1e-12)
    for got, want in zip(
        gradients(out.logprobs, upstream, hidden, weight, b),
        gradients(expected, upstream, hidden, weight, b),
        strict=True,
    ):
        assert_close(got, want, 1e-12)


def test_capped_logits_of_16_bit_inputs_are_capped_in_float32():
    hidden, weight, _, ids, upstream = make(64, 256, 997, dtype=torch.bfloat16, bias=False)
    logits = 5.0 * torch.tanh(hidden.double() @ weight.double().T / 5.0)
    truth = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    out = taken_logprobs(hidden, weight, ids, fp32_head=True, logit_softcap=5.0, chunk_tokens=8)
    assert (out.logprobs.double() - truth).abs().max() < 1e-4
    want = gradients(truth, upstream, hidden, weight)
    for g, w in zip(gradients(out.logprobs.double(), upstream, hidden, weight), want, strict=True):
        assert (g.double() - w.double()).norm() / w.double().norm() < 6e-3


def test_a_number_worked_by_hand():
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0, 9.0], [math.log(3), 9.0]], dtype=torch.float64)
    out = taken_logprobs(hidden, weight, torch.tensor([1]))
    assert_close(out.logprobs, torch.tensor([math.log(3 / 4)], dtype=torch.float64), 1e-15)
    assert_close(out.entropy, torch.tensor([math.log(4) - 0.75 * math.log(3)], dtype=torch.float64), 1e-15)


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    out = taken_logprobs(torch.zeros(3, H), torch.randn(V, H), torch.tensor([0, 5, 22]), chunk_tokens=1)
    assert_close(out.entropy, torch.full((3,), math.log(V)), 1e-6)
    assert_close(out.logprobs, torch.full((3,), -math.log(V)), 1e-6)


def test_large_logits_neither_overflow_nor_lose_the_entropy():
    hidden, weight, _, ids, _ = make(dtype=torch.float32, bias=False)
    hidden, weight = 40 * hidden.detach(), 10 * weight.detach()
    out = taken_logprobs(hidden, weight, ids, chunk_tokens=1)
    expected, entropy = naive(hidden.double(), weight.double(), None, ids)
    assert_close(out.logprobs.double(), expected, 1e-6)
    assert_close(out.entropy.double(), entropy, 1e-6)


def test_gradcheck_through_a_loss_that_mixes_all_tokens():
    hidden, weight, bias, ids, _ = make(n=4, v=9)

    def sequence_ratio(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (
            taken_logprobs(hidden, weight, ids, bias=bias, temperature=1.3, chunk_tokens=2)
            .logprobs.mean()
            .exp()
        )

    assert torch.autograd.gradcheck(sequence_ratio, (hidden, weight, bias), eps=1e-6, atol=1e-9)


def test_only_the_gradients_asked_for_are_computed():
    hidden, weight, bias, ids, upstream = make()
    expected, _ = naive(hidden, weight, bias, ids)
    want = dict(zip("hwb", gradients(expected, upstream, hidden, weight, bias), strict=True))
    for names in ("h", "w", "b", "hb", "wb"):
        inputs = {"h": hidden, "w": weight, "b": bias}
        inputs = {k: t.detach().requires_grad_(k in names) for k, t in inputs.items()}
        out = taken_logprobs(inputs["h"], inputs["w"], ids, bias=inputs["b"], chunk_tokens=2)
        (out.logprobs * upstream).sum().backward()
        for k, t in inputs.items():
            if k in names:
                assert_close(t.grad, want[k], 1e-12)
            else:
                assert t.grad is None


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_backward_twice_gives_the_same_gradient(kept_bytes):
    hidden, weight, bias, ids, upstream = make()
    out = taken_logprobs(hidden, weight, ids, bias=bias, chunk_tokens=2, kept_bytes=kept_bytes)
    loss = (out.logprobs * upstream).sum()
    first = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_entropy_is_detached_and_optional():
    hidden, weight, bias, ids, _ = make()
    assert not taken_logprobs(hidden, weight, ids).entropy.requires_grad
    without = taken_logprobs(hidden, weight, ids, bias=bias, with_entropy=False)
    assert without.entropy is None
    assert torch.equal(without.logprobs, taken_logprobs(hidden, weight, ids, bias=bias).logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float32_for_narrower_inputs(dtype):
    hidden, weight, bias, ids, _ = make(dtype=dtype)
    out = taken_logprobs(hidden, weight, ids, bias=bias)
    assert out.logprobs.dtype == out.entropy.dtype == torch.float32


def test_no_tokens():
    hidden, weight, bias, ids, upstream = make(n=0)
    out = taken_logprobs(hidden, weight, ids, bias=bias)
    assert out.logprobs.shape == out.entropy.shape == (0,)
    grads = gradients(out.logprobs, upstream, hidden, weight, bias)
    assert grads[0].shape == (0, H)
    assert not grads[1].any()
    assert not grads[2].any()


class _LogitCensus(TorchDispatchMode):
    """Counts the elements alive at once in storages of logits: tensors [tokens, columns but not H]."""

    def __init__(self, tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens, self.hidden_size, self.peak = tokens, hidden_size, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if (
                isinstance(t, Tensor)
                and t.dim() == 2
                and len(t) == self.tokens
                and t.shape[1] not in (1, self.hidden_size)
            ):
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // t.element_size())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(elements for _, elements in self.alive.values()))
        return out


def test_the_census_sees_the_logits_of_the_naive_way():
    hidden, weight, _, ids, _ = make(64, 2, 4096, bias=False)
    with _LogitCensus(64, 2) as census:
        naive(hidden, weight, None, ids)[0].sum().backward()
    assert census.peak >= 2 * 64 * 4096  # the logits and their log-softmax, at least


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize("chunk_tokens", [2, 5, 16])
def test_never_more_than_one_chunk_of_logits_alive(dtype, fp32_head, chunk_tokens):
    n, h, v = 64, 2, 4096
    hidden, weight, _, ids, upstream = make(n, h, v, dtype=dtype, bias=False)
    with _LogitCensus(n, h) as census:
        out = taken_logprobs(
            hidden, weight, ids, chunk_tokens=chunk_tokens, kept_bytes=0, fp32_head=fp32_head
        )
        forward = census.peak
        gradients(out.logprobs, upstream.to(out.logprobs.dtype), hidden, weight)
    assert 0.3 * chunk_tokens * v < forward <= census.peak <= chunk_tokens * v


@pytest.mark.parametrize("kept_share", [0.3, 0.6, 1.0])
def test_kept_logits_stay_within_their_bytes_and_spare_their_matmuls(kept_share):
    n, h, v, chunk = 64, 2, 4096, 4
    hidden, weight, _, ids, upstream = make(n, h, v, dtype=torch.float32, bias=False)
    budget = int(kept_share * n * v * 4)
    with _LogitCensus(n, h) as census:
        out = taken_logprobs(hidden, weight, ids, chunk_tokens=chunk, kept_bytes=budget)
        assert 0.9 * budget // 4 < census.peak - chunk * v <= budget // 4
        with FlopCounterMode(display=False) as counter:
            gradients(out.logprobs, upstream.float(), hidden, weight)
    assert census.peak <= chunk * v + budget // 4
    # 2NHV for weight's gradient and for each logit computed again; torch's counter (2.11) does
    # not see addmm_.
    assert counter.get_total_flops() == pytest.approx((2 + 2 * (1 - kept_share)) * n * h * v, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize("kept_share", [0.3, 0.6, 1.0])
def test_kept_logits_are_those_that_would_be_computed_again(dtype, fp32_head, kept_share):
    n, v = 32, 640
    hidden, weight, _, ids, upstream = make(n, 8, v, dtype=dtype, bias=False)
    width = 4 if fp32_head and dtype == torch.bfloat16 else dtype.itemsize
    results = []
    for kept_bytes in (0, int(kept_share * n * v * width)):
        out = taken_logprobs(hidden, weight, ids, chunk_tokens=4, kept_bytes=kept_bytes, fp32_head=fp32_head)
        grads = gradients(out.logprobs, upstream.to(out.logprobs.dtype), hidden, weight)
        results.append((out.logprobs, out.entropy, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_kept_where_no_gradient_will_be_asked_for():
    hidden, weight, _, ids, _ = make(64, 2, 4096, dtype=torch.float32, bias=False)
    with _LogitCensus(64, 2) as census, torch.no_grad():
        taken_logprobs(hidden, weight, ids, chunk_tokens=4)
    assert census.peak <= 4 * 4096


def test_float32_head_is_closer_to_the_truth_than_a_16_bit_head():
    hidden, weight, _, ids, upstream = make(64, 256, 997, dtype=torch.bfloat16, bias=False)
    truth, entropy = naive(hidden.double(), weight.double(), None, ids)
    narrow = taken_logprobs(hidden, weight, ids)
    wide = taken_logprobs(hidden, weight, ids, fp32_head=True)
    narrow_error, wide_error = ((o.logprobs.double() - truth).abs().max().item() for o in (narrow, wide))
    assert wide_error < 1e-4
    assert narrow_error > 1e-2
    assert (wide.entropy.double() - entropy).abs().max() < 1e-4
    want = gradients(truth, upstream, hidden, weight)
    for out, limit in ((narrow, 3e-2), (wide, 6e-3)):  # bfloat16 rounds to 2**-9 = 2e-3, twice here
        got = gradients(out.logprobs.double(), upstream, hidden, weight)
        for g, w in zip(got, want, strict=True):
            assert (g.double() - w.double()).norm() / w.double().norm() < limit


def test_autocast_does_not_narrow_the_head():
    hidden, weight, bias, ids, upstream = make(dtype=torch.float32)
    plain = taken_logprobs(hidden, weight, ids, bias=bias)
    expected = gradients(plain.logprobs, upstream.float(), hidden, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = taken_logprobs(hidden, weight, ids, bias=bias)
        got = gradients(out.logprobs, upstream.float(), hidden, weight, bias)
    assert torch.equal(out.logprobs, plain.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("most", "v"), [(32768, 151936), (8192, 151936), (1, 23), (5, 23), (200, 151936), (10**9, 23)]
)
def test_blocks_cover_the_vocabulary_within_the_budget(most, v):
    block = _block_columns(most, v)
    blocks = -(-v // block)
    assert block <= most
    assert blocks == 1 or block * blocks - v < max(128 * blocks, blocks)  # even: no thin last block
    if most >= 128 and block < v:
        assert block % 128 == 0


_PARALLEL_CHECK = """
import os, sys
import torch, torch.distributed as dist
from gspo_dist.learners.head.logprobs import VocabParallel, taken_logprobs
from gspo_dist.learners.head.others import other_logprobs
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
g = torch.Generator().manual_seed(1)
hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((11, 6), (29, 6), (29,)))
ids, up = torch.randint(29, (11,), generator=g), torch.randn(11, generator=g, dtype=torch.float64)
hidden[0] *= 50
full = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
x = (full[0] @ full[1].T + full[2]) / 0.7
logp = x.log_softmax(-1)
expected = logp.gather(1, ids[:, None])[:, 0]
entropy = -(logp.exp() * logp).sum(-1)
others, pull = torch.randint(29, (11, 3), generator=g), torch.randn(11, 3, generator=g, dtype=torch.float64)
want = torch.autograd.grad((expected * up).sum(), full, retain_graph=True)
more = torch.autograd.grad((expected * up).sum() + (logp.gather(1, others) * pull).sum(), full)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
for cut in (16, 29, 0, 3):  # uneven shards, and empty ones on either side
    a, b = ((0, cut), (cut, 29))[rank]
    for chunk in (1, 4, None):
        for reduce in (True, False):
            part = [t.clone().requires_grad_() for t in (hidden, weight[a:b], bias[a:b])]
            o = taken_logprobs(part[0], part[1], ids, bias=part[2], temperature=0.7, chunk_tokens=chunk,
                               kept_bytes=4 * 11 * 29,
                               vocab_parallel=VocabParallel(dist.group.WORLD, a, reduce_hidden_grad=reduce))
            close(o.logprobs, expected)
            close(o.entropy, entropy)
            (o.logprobs * up).sum().backward()
            if not reduce:
                partial = part[0].grad.clone()
                dist.all_reduce(part[0].grad)
                assert cut in (0, 29) or not torch.allclose(partial, part[0].grad)
            for p, expect in zip(part, (want[0], want[1][a:b], want[2][a:b]), strict=True):
                close(p.grad, expect)
    for reduce in (True, False):
        part = [t.clone().requires_grad_() for t in (hidden, weight[a:b], bias[a:b])]
        split = VocabParallel(dist.group.WORLD, a, reduce_hidden_grad=reduce)
        o = taken_logprobs(part[0], part[1], ids, bias=part[2], temperature=0.7, vocab_parallel=split)
        x = other_logprobs(part[0], part[1], ids, o.logprobs, others, bias=part[2], temperature=0.7,
                           vocab_parallel=split)
        close(x, logp.gather(1, others))
        ((o.logprobs * up).sum() + (x * pull).sum()).backward()
        if not reduce:
            dist.all_reduce(part[0].grad)
        for p, expect in zip(part, (more[0], more[1][a:b], more[2][a:b]), strict=True):
            close(p.grad, expect)
try:
    lost = torch.where(ids == ids[2], 29, ids)
    shard = weight[15 * rank : 15 + 14 * rank]
    taken_logprobs(hidden, shard, lost, vocab_parallel=VocabParallel(dist.group.WORLD, 15 * rank))
except ValueError as error:
    assert "token_ids" in str(error) and "[29" in str(error), error
else:
    raise AssertionError("an id of no shard was accepted")
dist.barrier()
print("agree", flush=True)
os._exit(0)  # gloo's threads abort now and then when the interpreter tears them down on a busy host
"""


@pytest.mark.slow
def test_a_vocabulary_split_over_two_processes_equals_one_process(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _PARALLEL_CHECK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[4],
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
            assert "agree" in out
    finally:
        for process in ranks:
            process.kill()
