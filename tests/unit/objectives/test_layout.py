"""Value, gradient and statistics do not depend on how the mini-batch is laid out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gspo_dist.metrics.stat import all_reduce_stats, merge_stats, results
from gspo_dist.objectives import (
    Denominators,
    Segments,
    get_objective,
    mismatch_metrics,
    mismatch_stats,
)
from gspo_dist.objectives.mismatch import correction
from gspo_dist.objectives.specs import OBJECTIVE_SPECS

NAMES = list(OBJECTIVE_SPECS)
ROOT = Path(__file__).resolve().parents[3]


def whole(name, t, count):
    lp = t.logprobs.detach().clone().requires_grad_()
    result = get_objective(name).loss(
        lp, t.old, t.advantages, Segments(t.ids, count), Denominators(count, t.ids.numel(), 64), offset=0.01
    )
    result.loss.backward()
    return result.loss.item(), lp.grad, results(result.stats)


def same_numbers(a: dict[str, float], b: dict[str, float]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=1e-10, abs=1e-12, nan_ok=True), key


@pytest.mark.parametrize("name", NAMES)
def test_packing_order_does_not_matter(name, ragged):
    t = ragged(21).tensors()
    loss, grad, stats = whole(name, t, 9)
    order = torch.randperm(t.ids.numel(), generator=torch.Generator().manual_seed(0))
    relabel = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    lp = t.logprobs.detach()[order].clone().requires_grad_()
    result = get_objective(name).loss(
        lp, t.old[order], t.advantages[order], Segments(relabel[t.ids[order]], 9),
        Denominators(9, t.ids.numel(), 64), offset=0.01,
    )  # fmt: skip
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(lp.grad, grad[order], rtol=1e-12, atol=1e-15)
    same_numbers(results(result.stats), stats)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layout",
    [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[0], [1, 2, 3, 4, 5, 6, 7, 8]], [[8, 2], [0, 7, 5], [1, 3, 4, 6]]],
)
def test_micro_batches_and_data_parallel_ranks_add_up(name, layout, ragged):
    """A micro-batch and a data-parallel rank are the same thing here: some sequences, global denominators."""
    t = ragged(22).tensors()
    loss, grad, stats = whole(name, t, 9)
    total, pieces, parts = 0.0, torch.zeros_like(grad), []
    for sequences in layout:
        take = torch.isin(t.ids, torch.tensor(sequences))
        local = torch.tensor([sequences.index(int(i)) for i in t.ids[take]])
        lp = t.logprobs.detach()[take].clone().requires_grad_()
        result = get_objective(name).loss(
            lp, t.old[take], t.advantages[take], Segments(local, len(sequences)),
            Denominators(9, t.ids.numel(), 64), offset=0.01,
        )  # fmt: skip
        result.loss.backward()
        total += result.loss.item()
        pieces[take] = lp.grad
        parts.append(result.stats)
    assert total == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(pieces, grad, rtol=1e-12, atol=1e-15)
    same_numbers(results(merge_stats(parts)), stats)


class Ranks:
    """Threads as ranks: an all-reduce whose backward is an all-reduce, by a shared list and a barrier."""

    def __init__(self, world: int) -> None:
        self.world, self.slots = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def sum(self, rank: int, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        self.slots[rank] = x.detach().clone()
        self.barrier.wait()
        stacked = torch.stack(self.slots)
        total = {"sum": stacked.sum(0), "min": stacked.amin(0), "max": stacked.amax(0)}[op]
        self.barrier.wait()
        return total

    def differentiable(self, rank: int):
        group = self

        class Reduce(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return group.sum(rank, x)

            @staticmethod
            def backward(ctx, grad):
                return group.sum(rank, grad)

        return Reduce.apply

    def run(self, work) -> list:
        out, errors = [None] * self.world, []

        def body(rank):
            try:
                out[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        if errors:
            raise errors[0]
        return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [2, 3])
def test_a_context_parallel_cut_does_not_matter(name, world, ragged):
    """Random owners: some ranks hold nothing of some sequences; one-token sequences are empty on all but
    one."""
    t = ragged(23).tensors()
    loss, grad, stats = whole(name, t, 9)
    owner = torch.randint(world, t.ids.shape, generator=torch.Generator().manual_seed(4))
    ranks = Ranks(world)

    def work(rank):
        mine = owner == rank
        lp = t.logprobs.detach()[mine].clone().requires_grad_()
        result = get_objective(name).loss(
            lp, t.old[mine], t.advantages[mine], Segments(t.ids[mine], 9, ranks.differentiable(rank)),
            Denominators(9, t.ids.numel(), 64), offset=0.01,
        )  # fmt: skip
        result.loss.backward()
        reduced = all_reduce_stats(result.stats, lambda x, op: ranks.sum(rank, x, op))
        return mine, result.loss.item(), lp.grad, results(reduced)

    pieces, total = torch.zeros_like(grad), 0.0
    for mine, part, local_grad, reduced in ranks.run(work):
        pieces[mine] = local_grad
        total += part
        same_numbers(reduced, stats)
    assert total == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(pieces, grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_a_single_token_takes_part(name, ragged):
    t = ragged(24).tensors()
    loss, grad, stats = whole(name, t, 9)
    ranks = Ranks(2)

    def work(rank):
        mine = torch.full_like(t.ids, rank == 0, dtype=torch.bool)
        lp = t.logprobs.detach()[mine].clone().requires_grad_()
        result = get_objective(name).loss(
            lp, t.old[mine], t.advantages[mine], Segments(t.ids[mine], 9, ranks.differentiable(rank)),
            Denominators(9, t.ids.numel(), 64), offset=0.01,
        )  # fmt: skip
        result.loss.backward()
        return result, lp.grad

    (full, g), (empty, none) = ranks.run(work)
    assert full.loss.item() == pytest.approx(loss, rel=1e-12)
    assert empty.loss.item() == 0.0
    assert none.numel() == 0
    torch.testing.assert_close(g, grad, rtol=1e-12, atol=1e-15)
    same_numbers(results(merge_stats([full.stats, empty.stats])), stats)


def test_mismatch_metrics_and_corrections_do_not_depend_on_the_layout(ragged):
    t = ragged(25).tensors()
    lp, rollout = t.logprobs.detach(), t.old
    expected = mismatch_metrics(mismatch_stats(lp, rollout, Segments(t.ids, 9)))
    parts = []
    for sequences in ([0, 4, 5], [1, 2, 3, 6, 7, 8]):
        take = torch.isin(t.ids, torch.tensor(sequences))
        local = torch.tensor([sequences.index(int(i)) for i in t.ids[take]])
        parts.append(mismatch_stats(lp[take], rollout[take], Segments(local, len(sequences))))
    same_numbers(mismatch_metrics(merge_stats(parts)), expected)

    owner, ranks = torch.arange(t.ids.numel()) % 2, Ranks(2)
    kinds = ("sequence_truncate", "sequence_mask", "geometric_reject", "veto", "opsm")

    def work(rank):
        mine = owner == rank
        segments = Segments(t.ids[mine], 9, ranks.differentiable(rank))
        stats = all_reduce_stats(
            mismatch_stats(lp[mine], rollout[mine], segments), lambda x, op: ranks.sum(rank, x, op)
        )
        cut = [correction(k, lp[mine], rollout[mine], t.advantages[mine], segments) for k in kinds]
        return mine, stats, cut

    for mine, stats, cut in ranks.run(work):
        same_numbers(mismatch_metrics(stats), expected)
        for kind, part in zip(kinds, cut):
            full = correction(kind, lp, rollout, t.advantages, Segments(t.ids, 9))
            torch.testing.assert_close(part.weights, full.weights[mine], rtol=1e-12, atol=0)
            assert torch.equal(part.keep, full.keep[mine])


def test_two_real_processes_with_cut_sequences_give_the_same_loss_gradient_and_stats(tmp_path, ragged):
    t = ragged(26, sequences=6).tensors()
    place = torch.cat([torch.arange(int(n)) for n in torch.bincount(t.ids)])
    half = (torch.bincount(t.ids)[t.ids] + 1) // 2
    data = {
        "logprobs": t.logprobs.detach(), "old": t.old, "advantages": t.advantages, "ids": t.ids, "count": 6,
        "owner": (place >= half).long(), "objectives": NAMES, "offset": 0.01,
    }  # fmt: skip
    torch.save(data, tmp_path / "in.pt")
    worker = Path(__file__).with_name("cp_worker.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(r), "2", str(tmp_path / "meet"), str(tmp_path / "in.pt"),
             str(tmp_path / f"out{r}.pt")],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], errors
    outs = [torch.load(tmp_path / f"out{r}.pt") for r in range(2)]
    for name in NAMES:
        loss, grad, stats = whole(name, t, 6)
        got = torch.zeros_like(grad)
        for r, out in enumerate(outs):
            got[data["owner"] == r] = out[name]["grad"]
            same_numbers(out[name]["stats"], stats)
        assert sum(out[name]["loss"].item() for out in outs) == pytest.approx(loss, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)
