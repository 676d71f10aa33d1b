"""The clip as a unit, the estimators of the offset, and the guard."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from gspo_dist.objectives import Denominators, Segments, get_objective
from gspo_dist.objectives.offset import (
    Clip,
    EmaOffset,
    GuardConfig,
    MismatchGuard,
    OffsetEstimate,
    batch_offset,
    choose_subset,
    make_guard,
    offset_from_moments,
)
from tests.unit.objectives.cases import F64, of_lengths

GSPO_CLIP = Clip(3e-4, 4e-4)


def gaussian_log_ratio(kl, tokens):
    """Mean and std of log s for independent token log ratios N(-kl, 2 kl)."""
    return -kl, math.sqrt(2.0 * kl / tokens)


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
    [
        (1.5e-3, 2048, 0.84),
        (1.5e-3, 8192, 0.98),
        (5e-4, 2048, 0.61),
        (5e-4, 8192, 0.72),
        (2e-4, 2048, 0.41),
        (2e-4, 8192, 0.33),
        (5e-5, 2048, 0.13),
        (5e-5, 8192, 0.01),
    ],
)
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
    segments = of_lengths(*[tokens] * sequences)
    adv, denominators = segments.expand(sign), Denominators(sequences, sequences * tokens, tokens)
    objective = get_objective("gspo")
    mean, std = gaussian_log_ratio(kl, tokens)

    def shares(offset):
        stats = objective.loss(rollout + log_ratio, rollout, adv, segments, denominators, offset=offset).stats
        got = [stats[f"objective/sequence_clip_fraction_{s}"].result() for s in ("negative", "positive")]
        return got, stats

    got, stats = shares(0.0)
    for value, expected in zip(got, GSPO_CLIP.expected_shares(mean, std), strict=True):
        assert abs(value - expected) < 4 * math.sqrt(expected * (1 - expected) / (sequences / 2)) + 1e-3
    measured = stats["objective/sequence_log_ratio_mean"].result()
    assert measured == pytest.approx(-kl, abs=4 * std / math.sqrt(sequences))
    square = stats["objective/sequence_log_ratio_square"].result()
    assert math.sqrt(square - measured**2) == pytest.approx(std, rel=4 / math.sqrt(2 * sequences))

    got, _ = shares(measured)
    for value, expected in zip(got, GSPO_CLIP.expected_shares(0.0, std), strict=True):
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
    segments = of_lengths(*lengths)
    rollout = -torch.rand(sum(lengths), generator=rng, dtype=F64)
    learner = rollout - 2e-3 + 0.02 * torch.randn(sum(lengths), generator=rng, dtype=F64)
    truth = segments.mean(learner - rollout).mean().item()
    offsets, errors = [], []
    for seed in range(1500):
        chosen = torch.tensor(choose_subset(64, 0.125, seed))
        assert len(chosen) == 8
        take = torch.isin(segments.ids, chosen)
        part = Segments(torch.searchsorted(chosen, segments.ids[take]), 8)
        estimate = batch_offset(part.mean(learner[take] - rollout[take]).tolist(), population=64)
        offsets.append(estimate.offset)
        errors.append(estimate.standard_error)
    assert abs(np.mean(offsets) - truth) < 4 * np.std(offsets) / math.sqrt(1500)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(offsets), rel=0.12)
    everything = batch_offset(segments.mean(learner - rollout).tolist(), population=64)
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
        (lambda: guard(ema_decay=1.0), r"objective\.guard\.ema_decay must be in \[0, 1\): got 1"),
        (lambda: guard(ema_decay=-0.1), r"objective\.guard\.ema_decay"),
        (
            lambda: guard(subset_fraction=1.5),
            r"objective\.guard\.subset_fraction must be in \(0, 1\]: got 1.5",
        ),
        (lambda: EmaOffset(1.0), r"^decay must be in \[0, 1\): got 1"),
        (lambda: EmaOffset(-0.1), "^decay must be in"),
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


def test_an_objective_without_a_clip_has_no_guard_and_may_not_ask_it_to_act():
    assert make_guard(GuardConfig(action="warn"), None) is None
    assert make_guard(GuardConfig(action="off"), GSPO_CLIP) is None
    made = make_guard(GuardConfig(action="recompute", threshold=3.0), GSPO_CLIP)
    assert (made.clip, made.config.action, made.config.threshold) == (GSPO_CLIP, "recompute", 3.0)
    for action in ("recentre", "recompute"):
        with pytest.raises(ValueError, match=f"off or warn.*got {action}; give the objective clip_low"):
            make_guard(GuardConfig(action=action), None)


def test_the_guard_acts_from_the_threshold_and_rests_below_half_of_it():
    width = math.log1p(4e-4)
    g = guard(action="recompute", threshold=2.0)
    assert g.config.release == 1.0
    actions = [g.observe(estimate(w * width)).action for w in (1.99, 2.01, 1.01, 0.99, 1.99)]
    assert actions == ["none", "recompute", "recompute", "none", "none"]


def test_the_guard_acts_on_the_running_mean_when_asked_to():
    """Decay .5: after 0 and -3e-3 the mean is (.25 * 0 + .5 * -3e-3) / .75 = -2e-3."""
    g = guard(action="recentre", estimator="ema", ema_decay=0.5)
    assert g.observe(estimate(0.0)).action == "none"
    assert g.observe(estimate(-3e-3)).offset == pytest.approx(-2e-3, rel=1e-12)


def test_an_offset_within_two_errors_of_zero_is_noise():
    for error, action in ((0.51e-3, "none"), (0.49e-3, "recentre")):
        assert guard(action="recentre").observe(estimate(1e-3, error=error)).action == action


def test_log_space_bounds_are_distances_of_the_log_ratio():
    clip = Clip(3.0, 0.5, log_space=True)
    assert (clip.log_low, clip.log_high) == (-3.0, 0.5)
    assert Clip(1.0, 1.0).log_low == -math.inf
    assert clip.expected_shares(0.0, 0.5)[1] == pytest.approx(0.158655253931457, rel=1e-12)  # P(z > 1)


@pytest.mark.parametrize(
    ("low", "high", "log_space"),
    [
        (0.0, 1.0, False),
        (1.1, 2.0, False),
        (0.5, 0.0, False),
        (0.5, math.inf, False),
        (math.nan, 1.0, False),
        (0.0, 1.0, True),
        (math.inf, 1.0, True),
        (1.0, 0.0, True),
    ],
)
def test_a_clip_without_room_is_refused(low, high, log_space):
    with pytest.raises(ValueError, match="clip_low must lie in"):
        Clip(low, high, log_space=log_space)


def test_moments_that_are_no_numbers_are_refused():
    for moments in ((math.nan, 0.0, 4), (0.0, math.inf, 4), (0.0, 0.0, 0)):
        with pytest.raises(ValueError, match="moments must be finite"):
            offset_from_moments(*moments)
    rounded = offset_from_moments(0.1, 0.1**2 * (1 - 1e-15), 3)  # rounding may not make the variance negative
    assert rounded.spread == pytest.approx(0.0, abs=1e-8)


def test_a_subset_has_its_share_but_at_least_two_of_two():
    assert len(choose_subset(100, 0.25, 0)) == 25
    assert len(choose_subset(100, 0.001, 0)) == 2
    assert choose_subset(1, 0.001, 0) == [0]
    assert choose_subset(3, 1.0, 7) == [0, 1, 2]
    assert choose_subset(50, 0.2, 1) == sorted(set(choose_subset(50, 0.2, 1)))


def test_the_edges_of_the_guards_settings_are_allowed():
    config = GuardConfig(ema_decay=0.0, subset_fraction=1.0, threshold=0.0)
    assert config.release == 0.0
    assert EmaOffset(0.0).update(estimate(2.0)).offset == 2.0
    assert EmaOffset(0.0).update(estimate(2.0)).standard_error == 1e-5
