"""What the tests of the objectives share.

Ragged random batches, every objective written a second time as plain loops over floats, and threads that
stand for context-parallel ranks.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.objectives import Denominators, Segments
from gspo_dist.objectives.second_moment import cut, squares

F64 = torch.float64
LIMIT = 40


def of_lengths(*lengths):
    """Segments of sequences that lie one after another: 2, 1 gives ids [0, 0, 1]."""
    counts = torch.tensor(lengths)
    return Segments(torch.repeat_interleave(torch.arange(len(counts)), counts), len(counts))


def shift_of(tokens):
    """A shift for every token, between 0.5 and 1: on both sides of rspo's floor of 0.7."""
    return 0.5 + 0.5 * torch.rand(tokens, generator=torch.Generator().manual_seed(3), dtype=F64)


def part_of(extra, index):
    """The same of some tokens."""
    return {name: x[index] if isinstance(x, torch.Tensor) else x for name, x in extra.items()}


def extra_of(name, t, offset=0.0, second_moment=0.04):
    """What the objective reads beside log-probs, of a whole mini-batch `t`."""
    if name == "rspo":
        return {"router_shift": shift_of(len(t.ids))}
    if name == "score_centering":
        return {"expected_score": -2.0 * shift_of(len(t.ids))}
    if name != "m2po":
        return {}
    values = squares(t.logprobs, t.old + offset, t.advantages)
    return {"second_moment_cut": cut(values, second_moment)}


def run(objective, t, count, *, offset=0.0, **kwargs):
    denominators = Denominators(count, t.ids.numel(), LIMIT)
    return objective.loss(
        t.logprobs,
        t.old,
        t.advantages,
        Segments(t.ids, count),
        denominators,
        offset=offset,
        extra=extra_of(objective.spec.name, t, offset, objective.resolved.get("second_moment")),
        **kwargs,
    )


def same_numbers(a: dict[str, float], b: dict[str, float]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=1e-10, abs=1e-12, nan_ok=True), key


@dataclass(frozen=True)
class Ragged:
    """A batch as lists of sequences: lp[i][t], old[i][t], adv[i]."""

    lp: list[list[float]]
    old: list[list[float]]
    adv: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(s) for s in self.lp]

    def flat(self, rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=torch.float64)

    def tensors(self) -> SimpleNamespace:
        """logprobs (leaf with gradient), old_logprobs, advantages, ids, all packed sequence after
        sequence."""
        lengths = torch.tensor(self.lengths)
        ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return SimpleNamespace(
            logprobs=self.flat(self.lp).requires_grad_(),
            old=self.flat(self.old),
            advantages=torch.tensor(self.adv, dtype=torch.float64)[ids],
            ids=ids,
        )


def make_batch(seed: int, sequences: int = 9, noise: float = 0.3, longest: int = 17) -> Ragged:
    """Log-probs near -1.5; the sequence ratios spread over both sides of every clip of the zoo."""
    rng = torch.Generator().manual_seed(seed)
    lp, old, adv = [], [], []
    for _ in range(sequences):
        n = int(torch.randint(1, longest + 1, (1,), generator=rng))
        o = -3.0 * torch.rand(n, generator=rng, dtype=torch.float64) - 0.05
        shift = 4e-4 * torch.randn(1, generator=rng, dtype=torch.float64)
        d = noise * torch.randn(n, generator=rng, dtype=torch.float64)
        if (
            float(torch.rand(1, generator=rng)) < 0.6
        ):  # a sequence ratio of GSPO's size under token ratios of GRPO's
            d = d - d.mean() + shift
        old.append(o.tolist())
        lp.append((o + d).tolist())
        adv.append(float(torch.randn(1, generator=rng, dtype=torch.float64)))
    return Ragged(lp, old, adv)


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _token_terms(name: str, lp: float, old: float, a: float, p: dict) -> tuple[float, float]:
    """(term to maximise, d term / d logprob) of one token, from the formulas of the papers."""
    r = math.exp(lp - old)
    if name in ("grpo", "dapo", "dr_grpo"):
        lo, hi = 1 - p["clip_low"], 1 + p["clip_high"]
        value = min(r * a, _clip(r, lo, hi) * a)
        grad = r * a if value == r * a else 0.0
        if p.get("dual_clip") is not None and a < 0 and p["dual_clip"] * a > value:
            value, grad = p["dual_clip"] * a, 0.0
        return value, grad
    if name == "cispo":
        w = _clip(r, 1 - p["clip_low"], 1 + p["clip_high"])
        return w * a * lp, w * a
    if name == "minirl":
        m = 0.0 if (a > 0 and r > 1 + p["clip_high"]) or (a < 0 and r < 1 - p["clip_low"]) else 1.0
        return m * r * a * lp, m * r * a
    if name == "reinforce":
        return r * a * lp, r * a
    if name == "score_centering":
        w = 1.0 if p["weight_cap"] is None else min(r, p["weight_cap"])
        return a * (w * lp - p["expected"]), w * a
    if name in ("dppo_tv", "dppo_kl"):
        new, was = math.exp(lp), math.exp(old)
        if name == "dppo_tv":
            far = abs(new - was)
        else:
            far = was * math.log(was / new) + (1 - was) * math.log((1 - was) / max(1 - new, 1e-8))
        too_high = a > 0 and new > was and far > p["delta_high"]
        too_low = a < 0 and new < was and far > p["delta_low"]
        m = 0.0 if too_high or too_low else 1.0
        return m * r * a * lp, m * r * a
    if name == "sapo":
        tau = p["tau_positive"] if a > 0 else p["tau_negative"]
        gate = 4 / tau / (1 + math.exp(-tau * (r - 1)))
        return gate * a, a * r / math.cosh(tau * (r - 1) / 2) ** 2
    raise AssertionError(name)


def _sequence_terms(
    name: str, lp: list[float], old: list[float], a: float, p: dict, shift: list[float]
) -> tuple[float, list[float]]:
    """(value of the sequence, d value / d logprob_t)."""
    n = len(lp)
    logs = [x - y for x, y in zip(lp, old, strict=True)]
    if name == "rspo":
        logs = [x + math.log(max(g, p["shift_floor"])) for x, g in zip(logs, shift, strict=True)]
    if name == "vespo":
        w = math.exp(min(max(sum(logs), -20.0), 20.0))
        k, c = (p["k_positive"], p["lambda_positive"]) if a >= 0 else (p["k_negative"], p["lambda_negative"])
        phi = w**k * math.exp(c * (1 - w))
        return phi * a * sum(lp), [phi * a] * n
    if name == "luspo":
        s = math.exp(sum(logs) / n)
        value = min(s * a, _clip(s, 1 - p["clip_low"], 1 + p["clip_high"]) * a)
        return n * value, [s * a if value == s * a else 0.0] * n
    if name in ("gspo", "gspo_token"):
        s = math.exp(sum(logs) / n)
        value = min(s * a, _clip(s, 1 - p["clip_low"], 1 + p["clip_high"]) * a)
        return value, [s * a / n if value == s * a else 0.0] * n
    assert name in ("gmpo", "rspo")
    kept = [min(x, p["clip_high"]) if a > 0 else max(x, -p["clip_low"]) for x in logs]
    g = math.exp(sum(kept) / n)
    return g * a, [g * a / n if k == x else 0.0 for k, x in zip(kept, logs, strict=True)]


def _dropped_by_m2po(batch: Ragged, limit: float) -> set[tuple[int, int]]:
    """(sequence, token) of those that algorithm 1 drops, one by one from the largest."""
    region = []
    for i, (lp, old, a) in enumerate(zip(batch.lp, batch.old, batch.adv, strict=True)):
        for t, (x, y) in enumerate(zip(lp, old, strict=True)):
            if (x - y) * a > 0:
                region.append(((x - y) ** 2, (i, t)))
    out = set()
    while region and sum(square for square, _ in region) / len(region) > limit:
        worst = max(region)
        region.remove(worst)
        out.add(worst[1])
    return out


def reference(
    name: str, aggregation: str, params: dict, batch: Ragged, limit: int
) -> tuple[float, list[float]]:
    """(loss, gradient per token) of the whole batch by loops."""
    sequences, tokens = len(batch.lp), sum(batch.lengths)
    loss, grads = 0.0, []
    dropped = _dropped_by_m2po(batch, params["second_moment"]) if name == "m2po" else set()
    shifts = [part.tolist() for part in shift_of(tokens).split(batch.lengths)]
    for i, (lp, old, a) in enumerate(zip(batch.lp, batch.old, batch.adv, strict=True)):
        n = len(lp)
        if name == "vespo":
            assert aggregation == "token_mean"
            value, grad = _sequence_terms(name, lp, old, a, params, shifts[i])
            loss -= value / tokens
            grads += [-g / tokens for g in grad]
            continue
        if name in ("gspo", "gspo_token", "luspo", "gmpo", "rspo"):
            assert aggregation == ("sequence_sum" if name == "luspo" else "sequence_mean")
            value, grad = _sequence_terms(name, lp, old, a, params, shifts[i])
            loss -= value / sequences
            grads += [-g / sequences for g in grad]
            continue
        scale = {
            "token_mean": 1 / tokens,
            "sequence_mean": 1 / (n * sequences),
            "sequence_sum": 1 / sequences,
            "constant_length": 1 / (limit * sequences),
        }[aggregation]
        for t, (x, y) in enumerate(zip(lp, old, strict=True)):
            if name == "m2po":
                value = grad = 0.0 if (i, t) in dropped else math.exp(x - y) * a
            else:
                own = params | {"expected": -2.0 * shifts[i][t]} if name == "score_centering" else params
                value, grad = _token_terms(name, x, y, a, own)
            loss -= scale * value
            grads.append(-scale * grad)
    return loss, grads


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
