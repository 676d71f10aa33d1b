"""Offsets by age, the clip's reach and the decoupled weight, against references in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gspo_dist.metrics.stat import results
from gspo_dist.objectives import Denominators, Segments, get_objective
from gspo_dist.objectives.mismatch import correction
from gspo_dist.objectives.offset import Clip
from gspo_dist.objectives.staleness import (
    OWN_MEAN_FROM,
    LagOffsets,
    by_lag,
    offsets_by_lag,
    staleness_stats,
)

F64 = torch.float64
LENGTH = 5


def walk(sequences: int = 40, seed: int = 0):
    """(log ratios [N], lags [N], sequence of each token [N]) of completions that span two of three versions.

    The log ratio of a token of lag k is about -0.002 k, with a spread of 0.05.
    """
    rng = np.random.default_rng(seed)
    lags = np.array([[8] * 3 + [4] * 2, [4] * 2 + [0] * 3, [4] * 5])[rng.integers(0, 3, sequences)]
    delta = rng.normal(-0.002 * lags, 0.05)
    ids = np.repeat(np.arange(sequences), LENGTH)
    return delta.reshape(-1), lags.reshape(-1), ids


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def reference_offsets(delta, lags, ids):
    """Lag -> mean over its sequences of the mean over their tokens of that lag: loops, nothing shared."""
    out = {}
    for lag in sorted(set(lags.tolist())):
        means = []
        for s in sorted(set(ids.tolist())):
            values = [d for d, k, i in zip(delta, lags, ids, strict=True) if k == lag and i == s]
            if values:
                means.append(math.fsum(values) / len(values))
        out[lag] = (math.fsum(means) / len(means), len(means))
    return out


def test_own_offsets_are_means_over_the_sequences_that_hold_the_lag():
    delta, lags, ids = walk()
    expected = reference_offsets(delta, lags, ids)
    d, k, i = tensors(delta, lags, ids)
    got = offsets_by_lag(d, k, Segments(i, 40), [0, 4, 8], LagOffsets({0: 9.0, 4: 9.0, 8: 9.0}, own=True))
    counts = {lag: n for lag, (_, n) in expected.items()}
    assert counts[4] >= OWN_MEAN_FROM > counts[0]
    for lag in (0, 4, 8):
        wanted = expected[lag][0] if counts[lag] >= OWN_MEAN_FROM else 9.0
        assert got[k == lag].tolist() == pytest.approx([wanted] * int((k == lag).sum()), rel=1e-12), lag


@pytest.mark.parametrize(("count", "own"), [(15, False), (16, True)])
def test_sixteen_sequences_are_enough_for_a_mean_of_their_own(count, own):
    d, lags, ids = torch.arange(count, dtype=torch.float64), torch.full((count,), 4), torch.arange(count)
    got = offsets_by_lag(d, lags, Segments(ids, count), [4], LagOffsets({4: 9.0}, own=True))
    assert set(got.tolist()) == {(count - 1) / 2 if own else 9.0}


def test_a_lag_that_few_sequences_hold_takes_what_was_measured_before_or_nothing():
    delta, lags, ids = walk(6)
    d, k, i = tensors(delta, lags, ids)
    got = offsets_by_lag(d, k, Segments(i, 6), [0, 4, 8], LagOffsets({4: -0.25}, own=True))
    assert set(got[k == 4].tolist()) == {-0.25}
    assert set(got[k != 4].tolist()) == {0.0}


def test_later_mini_batches_take_what_was_measured_and_no_mean_of_their_own():
    delta, lags, ids = walk()
    d, k, i = tensors(delta, lags, ids)
    got = offsets_by_lag(d, k, Segments(i, 40), [0, 4, 8], LagOffsets({0: 0.1, 4: 0.2, 8: 0.3}))
    assert got.tolist() == pytest.approx([0.1 + 0.1 * (lag // 4) for lag in lags.tolist()], rel=1e-12)


def test_by_lag_by_hand():
    found = by_lag(
        torch.tensor([1.0, 3.0, 5.0, 7.0]),
        torch.tensor([0, 0, 4, 4]),
        Segments(torch.tensor([0, 0, 0, 1]), 2),
        [0, 4],
    )
    assert [t.tolist() for t in found[0]] == [[2.0, 0.0], [2.0, 0.0]]
    assert [t.tolist() for t in found[4]] == [[5.0, 7.0], [1.0, 1.0]]


def gspo_reference(delta, ids, advantages, offsets, weights, low=3e-4, high=4e-4):
    """GSPO's loss and its gradient by each token's log-prob, sequence after sequence in plain Python."""
    loss, grad = 0.0, np.zeros(len(delta))
    count = int(ids.max()) + 1
    for s in range(count):
        at = np.flatnonzero(ids == s)
        ratio = math.exp(math.fsum(delta[at] - offsets[at]) / len(at))
        a, w = advantages[s], weights[s]
        clipped = (ratio < 1 - low and a < 0) or (ratio > 1 + high and a > 0)
        used = min(max(ratio, 1 - low), 1 + high) if clipped else ratio
        loss -= w * used * a / count
        if not clipped:
            grad[at] = -w * ratio * a / len(at) / count
    return loss, grad


@pytest.mark.parametrize("kind", ["none", "by_lag", "decoupled"])
def test_gspo_on_old_tokens_against_a_second_implementation(kind):
    """Offsets move the ratio before it is clipped; a weight multiplies the loss after it."""
    delta, lags, ids = walk()
    advantages = np.random.default_rng(1).normal(size=40)
    engine = np.full(len(delta), -1.0)
    age = np.random.default_rng(2).normal(0.0, 0.03, len(delta))  # of the anchor against the engine
    segments = Segments(torch.tensor(ids), 40)
    offsets, weights, old, corrected = np.zeros(len(delta)), np.ones(40), engine, None
    if kind == "by_lag":
        table = {lag: mean for lag, (mean, _) in reference_offsets(delta, lags, ids).items()}
        offsets = np.array([table[lag] for lag in lags.tolist()])
    if kind == "decoupled":
        old = engine + age
        weights = np.array([min(math.exp(age[ids == s].mean()), 1.0) for s in range(40)])
        assert 0.2 < np.mean(weights == 1.0) < 0.8
        corrected = correction(
            "geometric_truncate",
            *tensors(old, engine, np.repeat(advantages, LENGTH)),
            segments,
            high=1.0,
        )
    logprobs = torch.tensor(old + delta, requires_grad=True)
    result = get_objective("gspo").loss(
        logprobs,
        torch.tensor(old),
        torch.tensor(np.repeat(advantages, LENGTH)),
        segments,
        Denominators(40, len(delta), LENGTH),
        correction=corrected,
        offset=torch.tensor(offsets) if kind == "by_lag" else 0.0,
    )
    result.loss.backward()
    loss, grad = gspo_reference(delta, ids, advantages, offsets, weights)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx(grad.tolist(), rel=1e-12, abs=1e-18)
    assert results(result.stats)["objective/offset"] == pytest.approx(offsets.mean(), abs=1e-15)


def test_where_nothing_is_clipped_the_decoupled_objective_is_gspo_on_the_engines_log_probs():
    """w s = exp(mean(old - engine)) exp(mean(now - old)) = exp(mean(now - engine)), in value and gradient."""
    rng = np.random.default_rng(3)
    ids = torch.tensor(np.repeat(np.arange(8), LENGTH))
    engine, old, now = (torch.tensor(-1.0 + rng.normal(0, 0.05, 8 * LENGTH)) for _ in range(3))
    advantages = torch.tensor(np.repeat(rng.normal(size=8), LENGTH))
    segments, denominators = Segments(ids, 8), Denominators(8, 8 * LENGTH, LENGTH)
    open_clip = get_objective("gspo", clip_low=0.9, clip_high=0.99, allow_wide_clip=True)
    out = []
    for anchor, name in ((engine, "none"), (old, "geometric_truncate")):
        leaf = now.clone().requires_grad_()
        weights = correction(name, anchor, engine, advantages, segments)
        loss = open_clip.loss(leaf, anchor, advantages, segments, denominators, correction=weights).loss
        loss.backward()
        out.append((loss.item(), leaf.grad.tolist()))
    assert out[1][0] == pytest.approx(out[0][0], rel=1e-12)
    assert out[1][1] == pytest.approx(out[0][1], rel=1e-12)


def test_an_offset_of_each_token_must_be_finite_and_of_the_batchs_shape():
    ids = torch.tensor([0, 0, 1])
    args = (torch.zeros(3), torch.zeros(3), torch.ones(3), Segments(ids, 2), Denominators(2, 3, 4))
    with pytest.raises(ValueError, match=r"offset must be finite: got nan at token 1 of sequence 0"):
        get_objective("gspo").loss(*args, offset=torch.tensor([0.0, math.nan, 0.0]))
    with pytest.raises(ValueError, match=r"offset must be \[N=3\]"):
        get_objective("gspo").loss(*args, offset=torch.zeros(2))


@pytest.mark.parametrize(("length", "kl"), [(64, 1e-4), (2048, 7.6e-5)])
def test_what_a_walk_does_to_the_clip_is_what_the_gaussian_model_says(length, kl):
    """log s ~ N(-k, 2k / T): long completions lose their negative side, and recentring brings it back."""
    rng = np.random.default_rng(length)
    count, clip = 4000, Clip(3e-4, 4e-4)
    k = 4 * kl  # four optimiser steps
    means = rng.normal(-k, math.sqrt(2 * k / length), count)
    ids = torch.arange(count)
    stats = staleness_stats(
        torch.tensor(means),
        torch.full((count,), 4),
        Segments(ids, count),
        [4],
        clip=clip,
        sequence_level=True,
    )
    low, high = clip.expected_shares(-k, math.sqrt(2 * k / length))
    assert results(stats)["staleness/outside_clip_fraction"] == pytest.approx(low + high, abs=0.03)
    if length == 2048:
        assert low > 4 * high
        even = clip.expected_shares(0.0, math.sqrt(2 * k / length))
        recentred = means - results(stats)["staleness/log_ratio_mean/lag_4"]
        assert np.mean(recentred < clip.log_low) == pytest.approx(even[0], abs=0.03)
        assert np.mean(recentred > clip.log_high) == pytest.approx(even[1], abs=0.03)
