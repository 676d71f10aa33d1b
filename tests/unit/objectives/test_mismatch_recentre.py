"""Engine against learner: corrections, metrics, the offset estimators and the guard."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from gspo_dist.objectives import Denominators, Segments, get_objective
from gspo_dist.objectives.mismatch import correction, mismatch_metrics, mismatch_stats
from gspo_dist.objectives.offset import (
    Clip,
    EmaOffset,
    GuardConfig,
    MismatchGuard,
    OffsetEstimate,
    batch_offset,
    choose_subset,
    offset_from_moments,
)

F64 = torch.float64
GSPO_CLIP = Clip(3e-4, 4e-4)


def gaussian_log_ratio(kl, tokens):
    """Mean and std of log s for independent token log ratios N(-kl, 2 kl)."""
    return -kl, math.sqrt(2.0 * kl / tokens)


def subset_offset(learner, rollout, segments, population):
    return batch_offset(segments.mean(learner - rollout).tolist(), population=population)


def three_sequences():
    """Ratios by hand: sequence 0: 2, .5; sequence 1: 4, 1e-5, 1; sequence 2: 1.1."""
    ratio = torch.tensor([2.0, 0.5, 4.0, 1e-5, 1.0, 1.1], dtype=F64)
    rollout = torch.tensor([-0.9, -1.0, -2.0, -0.2, -0.3, -1.0], dtype=F64)
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 2.0], dtype=F64)
    return rollout + ratio.log(), rollout, adv, Segments.from_lengths([2, 3, 1])


P1 = 4e-5  # product of sequence 1
CASES = {
    "token_truncate": ({}, [2.0, 0.5, 2.0, 1e-5, 1.0, 1.1], [1, 1, 1, 1, 1, 1]),
    "token_mask": ({"low": 0.5, "high": 3.0}, [2.0, 0.5, 4.0, 1e-5, 1.0, 1.1], [1, 1, 0, 0, 1, 1]),
    "sequence_truncate": ({"high": 1.05}, [1.0, 1.0, P1, P1, P1, 1.05], [1, 1, 1, 1, 1, 1]),
    "sequence_mask": ({"low": 1e-3, "high": 1.05}, [1.0, 1.0, P1, P1, P1, 1.1], [1, 1, 0, 0, 0, 0]),
    "geometric_reject": ({"low": 0.9, "high": 1.05}, [1.0] * 6, [1, 1, 0, 0, 0, 0]),
    "veto": ({}, [1.0] * 6, [1, 1, 0, 0, 0, 1]),
    "opsm": ({}, [1.0] * 6, [1, 1, 0, 0, 0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_corrections_by_hand(name):
    old, rollout, adv, segments = three_sequences()
    if name == "token_mask":  # keep the exact bound .5 away from rounding
        old = old + 1e-12
    bounds, weights, keep = CASES[name]
    got = correction(name, old, rollout, adv, segments, **bounds)
    torch.testing.assert_close(got.weights, torch.tensor(weights, dtype=F64), rtol=1e-10, atol=0)
    assert got.keep.tolist() == [bool(k) for k in keep]


def test_opsm_needs_a_negative_advantage_and_reads_the_current_policy():
    old, rollout, adv, segments = three_sequences()
    assert correction("opsm", old, rollout, adv.abs(), segments).keep.all()
    assert correction("opsm", rollout, rollout, adv, segments).keep.all()
    assert correction("opsm", rollout, rollout, adv, segments, logprobs=old).keep.tolist() == [
        True, True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_no_mismatch_no_correction(name):
    _, rollout, adv, segments = three_sequences()
    got = correction(name, rollout, rollout, adv, segments)
    assert got.weights.tolist() == [1.0] * 6
    assert got.keep.all()


@pytest.mark.parametrize(
    ("name", "bounds", "message"),
    [
        ("token_truncte", {}, "correction.*did you mean 'token_truncate'"),
        ("token_truncate", {"low": 0.5}, "token_truncate has no parameter 'low'"),
        ("none", {"high": 2.0}, "none has no parameter 'high'"),
        ("token_mask", {"low": 2.0, "high": 3.0}, "token_mask must accept the ratio 1"),
        ("token_truncate", {"high": 0.5}, "token_truncate must accept the ratio 1"),
        ("veto", {"low": -1.0}, "veto: low"),
        ("geometric_reject", {"high": math.inf}, "geometric_reject.high must be a finite number"),
    ],
)
def test_bad_corrections_name_the_field(name, bounds, message):
    old, rollout, adv, segments = three_sequences()
    with pytest.raises(ValueError, match=message):
        correction(name, old, rollout, adv, segments, **bounds)
    with pytest.raises(ValueError, match="rollout_logprobs"):
        correction("none", old, rollout[:2], adv, segments)


def test_metrics_against_numpy():
    rng = np.random.default_rng(0)
    lengths = [4, 9, 1, 30]
    ids = np.repeat(np.arange(4), lengths)
    q = -3 * rng.random(44)
    p = q + 0.5 * rng.normal(size=44)
    got = mismatch_metrics(mismatch_stats(torch.tensor(p), torch.tensor(q), Segments(torch.tensor(ids), 4)))
    d = p - q
    means = np.array([d[ids == i].mean() for i in range(4)])
    sums = np.array([d[ids == i].sum() for i in range(4)])
    w = np.exp(d)
    expected = {
        "kl": -d.mean(),
        "k3_kl": (w - d - 1).mean(),
        "chi2_token": (w**2).mean() - 1,
        "chi2_sequence": np.exp(2 * sums).mean() - 1,
        "log_ratio_mean": means.mean(),
        "log_ratio_std": means.std(),
        "ppl_ratio": np.exp(-means).mean(),
        "extreme_fraction": (np.maximum(w, 1 / w) > 2).mean(),
        "abs_log_ratio_mean": np.abs(d).mean(),
        "abs_log_ratio_max": np.abs(d).max(),
        "token_mult_prob_error": np.exp(np.abs(d)).mean(),
        "abs_prob_difference_mean": np.abs(np.exp(p) - np.exp(q)).mean(),
        "abs_prob_difference_max": np.abs(np.exp(p) - np.exp(q)).max(),
        "ess": 1 / ((w / w.mean()) ** 2).mean(),
        "probability_correlation": np.corrcoef(np.exp(p), np.exp(q))[0, 1],
    }
    assert {k.removeprefix("mismatch/") for k in got} == set(expected)
    for key, value in expected.items():
        assert got[f"mismatch/{key}"] == pytest.approx(value, rel=1e-10), key


def test_equal_logprobs_are_a_perfect_match():
    q = -torch.rand(20, dtype=F64, generator=torch.Generator().manual_seed(0))
    got = mismatch_metrics(mismatch_stats(q, q, Segments.from_lengths([5, 15])))
    one = {"mismatch/ppl_ratio", "mismatch/token_mult_prob_error", "mismatch/ess"}
    for key, value in got.items():
        expected = 1.0 if key in one or key.endswith("correlation") else 0.0
        assert value == pytest.approx(expected, abs=1e-12), key


def test_clip_widths():
    assert GSPO_CLIP.widths(-1.5e-3) == pytest.approx(-1.5e-3 / -math.log(1 - 3e-4))
    assert GSPO_CLIP.widths(math.log(1.0004)) == pytest.approx(1.0, rel=1e-12)
    assert GSPO_CLIP.widths(math.log(0.9997)) == pytest.approx(-1.0, rel=1e-12)
    assert Clip(0.4, 0.4, log_space=True).widths(-0.2) == pytest.approx(-0.5)
    assert Clip(1.0, 4.0).widths(-5.0) == 0.0  # no lower bound: nothing to come near to
    with pytest.raises(ValueError, match="clip_low"):
        Clip(-1.0, 1.0)
    with pytest.raises(ValueError, match="mean_log_ratio"):
        Clip(0.1, 0.1).widths(math.nan)


@pytest.mark.parametrize(
    ("kl", "tokens", "share"),
    [(1.5e-3, 2048, 0.84), (1.5e-3, 8192, 0.98), (5e-4, 2048, 0.61), (5e-4, 8192, 0.72), (2e-4, 2048, 0.41),
     (2e-4, 8192, 0.33), (5e-5, 2048, 0.13), (5e-5, 8192, 0.01)],
)  # fmt: skip
def test_closed_form_of_the_share_of_clipped_negative_sequences(kl, tokens, share):
    negative, positive = GSPO_CLIP.expected_shares(*gaussian_log_ratio(kl, tokens))
    assert negative == pytest.approx(share, abs=0.005)
    assert positive < 0.12


@pytest.mark.parametrize(("kl", "tokens"), [(1.5e-3, 512), (2e-4, 1024)])
def test_clipped_shares_at_mismatch_kl_follow_the_gaussian_closed_form(kl, tokens):
    """Simulated engine log-probs through the real GSPO loss, before and after recentring; four standard
    errors."""
    sequences = 3000
    rng = torch.Generator().manual_seed(7)
    log_ratio = torch.randn(sequences * tokens, generator=rng) * math.sqrt(2 * kl) - kl
    rollout = -torch.rand(sequences * tokens, generator=rng)
    sign = 1.0 - 2.0 * (torch.arange(sequences) % 2)
    segments = Segments.from_lengths([tokens] * sequences)
    adv, denominators = segments.expand(sign), Denominators(sequences, sequences * tokens, tokens)
    objective = get_objective("gspo")
    mean, std = gaussian_log_ratio(kl, tokens)

    def shares(offset):
        stats = objective.loss(rollout + log_ratio, rollout, adv, segments, denominators, offset=offset).stats
        got = [stats[f"objective/sequence_clip_fraction_{s}"].result() for s in ("negative", "positive")]
        return got, stats

    got, stats = shares(0.0)
    for value, expected in zip(got, GSPO_CLIP.expected_shares(mean, std)):
        assert abs(value - expected) < 4 * math.sqrt(expected * (1 - expected) / (sequences / 2)) + 1e-3
    measured = stats["objective/sequence_log_ratio_mean"].result()
    assert measured == pytest.approx(-kl, abs=4 * std / math.sqrt(sequences))
    square = stats["objective/sequence_log_ratio_square"].result()
    assert math.sqrt(square - measured**2) == pytest.approx(std, rel=4 / math.sqrt(2 * sequences))

    got, _ = shares(measured)
    for value, expected in zip(got, GSPO_CLIP.expected_shares(0.0, std)):
        assert abs(value - expected) < 4 * math.sqrt(expected * (1 - expected) / (sequences / 2)) + 1e-3


def test_batch_offset_is_unbiased_and_its_own_batch_loses_one_degree_of_freedom():
    """2,000 mini-batches of 8 sequences: the mean of the estimates, and the variance left after
    recentring."""
    rng = np.random.default_rng(5)
    true, sigma, trials, count = -1.5e-3, 1.2e-3, 2000, 8
    x = rng.normal(true, sigma, size=(trials, count))
    estimates = [batch_offset(row) for row in x]
    offsets = np.array([e.offset for e in estimates])
    assert abs(offsets.mean() - true) < 4 * sigma / math.sqrt(count * trials)
    assert np.mean([e.standard_error**2 for e in estimates]) == pytest.approx(sigma**2 / count, rel=0.05)
    left = x - offsets[:, None]
    np.testing.assert_allclose(left.mean(axis=1), 0.0, atol=1e-15)
    assert left.var() == pytest.approx(sigma**2 * (count - 1) / count, rel=0.05)
    fresh = rng.normal(true, sigma, size=(trials, count)) - offsets[:, None]
    assert fresh.var() == pytest.approx(sigma**2 * (count + 1) / count, rel=0.05)


def test_offset_from_moments_is_the_batch_estimate():
    x = [-1.2e-3, -2.0e-3, 0.4e-3, -1.1e-3]
    a = batch_offset(x)
    b = offset_from_moments(float(np.mean(x)), float(np.mean(np.square(x))), 4)
    assert a.offset == pytest.approx(b.offset, rel=1e-14)
    assert a.spread == pytest.approx(b.spread, rel=1e-10)
    assert a.spread == pytest.approx(np.std(x, ddof=1), rel=1e-12)
    assert a.standard_error == pytest.approx(np.std(x, ddof=1) / 2, rel=1e-12)
    assert batch_offset([0.1]).standard_error == math.inf


def test_subset_offset_is_unbiased_and_its_standard_error_is_honest():
    rng = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 30, (64,), generator=rng).tolist()
    segments = Segments.from_lengths(lengths)
    rollout = -torch.rand(sum(lengths), generator=rng, dtype=F64)
    learner = rollout - 2e-3 + 0.02 * torch.randn(sum(lengths), generator=rng, dtype=F64)
    truth = segments.mean(learner - rollout).mean().item()
    offsets, errors = [], []
    for seed in range(1500):
        chosen = torch.tensor(choose_subset(64, 0.125, seed))
        assert len(chosen) == 8
        take = torch.isin(segments.ids, chosen)
        part = Segments(torch.searchsorted(chosen, segments.ids[take]), 8)
        estimate = subset_offset(learner[take], rollout[take], part, population=64)
        offsets.append(estimate.offset)
        errors.append(estimate.standard_error)
    assert abs(np.mean(offsets) - truth) < 4 * np.std(offsets) / math.sqrt(1500)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(offsets), rel=0.12)
    everything = subset_offset(learner, rollout, segments, population=64)
    assert everything.offset == pytest.approx(truth, rel=1e-12)
    assert everything.standard_error == 0.0
    assert choose_subset(64, 0.125, 3) == choose_subset(64, 0.125, 3) != choose_subset(64, 0.125, 4)


def test_ema_is_unbiased_for_a_constant_from_the_first_step_and_lags_a_drift_as_stated():
    d, v = 0.9, -1e-4
    constant, drifting = EmaOffset(d), EmaOffset(d)
    for n in range(1, 40):
        one = constant.update(OffsetEstimate(-1.5e-3, 1e-4, 1e-3, 8))
        assert one.offset == pytest.approx(-1.5e-3, rel=1e-13)
        weights = np.array([(1 - d) * d**k / (1 - d**n) for k in range(n)])
        assert one.standard_error == pytest.approx(1e-4 * math.sqrt((weights**2).sum()), rel=1e-12)
        got = drifting.update(OffsetEstimate(v * n, 0.0, 0.0, 8)).offset
        lag = d / (1 - d) - n * d**n / (1 - d**n)
        assert got == pytest.approx(v * n - v * lag, rel=1e-10)
    assert lag == pytest.approx(9.0, abs=0.8)


def estimate(offset, error=1e-5, spread=1.2e-3):
    return OffsetEstimate(offset, error, spread, 64)


def guard(**kwargs):
    return MismatchGuard(GuardConfig(**kwargs), GSPO_CLIP)


def test_guard_recentres_with_hysteresis_on_both_sides():
    g = guard(action="recentre")
    quiet = g.observe(estimate(-2.0e-4))
    assert (quiet.action, quiet.offset, quiet.changed) == ("none", 0.0, False)
    on = g.observe(estimate(-1.5e-3))
    assert (on.action, on.offset, on.changed) == ("recentre", -1.5e-3, True)
    assert "is -5.00 clip widths" in on.reason
    assert "clip widths" in on.reason
    assert "84%" in on.reason
    assert "40%" in on.reason
    held = g.observe(estimate(-2.0e-4))  # below the threshold, above the release
    assert (held.action, held.offset, held.changed) == ("recentre", -2.0e-4, False)
    off = g.observe(estimate(-1.0e-4))
    assert (off.action, off.offset, off.changed) == ("none", 0.0, True)
    assert g.observe(estimate(+4.1e-4)).action == "recentre"


@pytest.mark.parametrize(
    ("action", "expected"), [("off", "none"), ("warn", "warn"), ("recompute", "recompute")]
)
def test_guard_actions_that_subtract_nothing(action, expected):
    decision = guard(action=action).observe(estimate(-1.5e-3))
    assert (decision.action, decision.offset) == (expected, 0.0)


def test_guard_does_not_act_on_noise():
    g = guard(action="recompute")
    decision = g.observe(estimate(-1.5e-3, error=1e-3))
    assert decision.action == "none"
    assert "within 2 errors of 0" in decision.reason
    assert g.observe(batch_offset([-1.5e-3])).action == "none"  # one sequence: no standard error


def test_guard_state_survives_json_and_continues_identically():
    a = guard(action="recentre", estimator="ema")
    offsets = [-1e-3, -1.6e-3, -2e-4, -1e-4, -1e-4, 0.0, 0.0, -5e-4]
    for x in offsets[:3]:
        a.observe(estimate(x))
    b = guard(action="recentre", estimator="ema")
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    for x in offsets[3:]:
        assert a.observe(estimate(x)) == b.observe(estimate(x))
    with pytest.raises(ValueError, match="ema decay"):
        guard(estimator="ema", ema_decay=0.5).load_state_dict(a.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guard(action="recenter"), "guard.action.*did you mean 'recentre'"),
        (lambda: guard(estimator="mean"), "guard.estimator"),
        (lambda: guard(threshold=-1.0), "guard.threshold"),
        (lambda: guard(ema_decay=1.0), "decay"),
        (lambda: guard(subset_fraction=0.0), "guard.subset_fraction"),
        (lambda: batch_offset([]), "sequence_log_ratios"),
        (lambda: batch_offset([math.nan]), "sequence_log_ratios"),
        (lambda: batch_offset([0.0, 1.0], population=1), "population"),
        (lambda: choose_subset(4, 0.0, 0), "fraction"),
        (lambda: Clip(0.1, 0.1).expected_shares(0.0, 0.0), "std"),
    ],
)
def test_bad_inputs_name_the_field(call, message):
    with pytest.raises(ValueError, match=message):
        call()
