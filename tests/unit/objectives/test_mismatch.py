"""Engine against learner: corrections by hand, metrics against numpy, any layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gspo_dist.metrics.stat import merge_stats
from gspo_dist.objectives import Segments
from gspo_dist.objectives.mismatch import correction, mismatch_metrics, mismatch_stats
from tests.unit.objectives.cases import F64, Ranks, make_batch, of_lengths, same_numbers


def three_sequences():
    """Ratios by hand: sequence 0: 2, .5; sequence 1: 4, 1e-5, 1; sequence 2: 1.1."""
    ratio = torch.tensor([2.0, 0.5, 4.0, 1e-5, 1.0, 1.1], dtype=F64)
    rollout = torch.tensor([-0.9, -1.0, -2.0, -0.2, -0.3, -1.0], dtype=F64)
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 2.0], dtype=F64)
    return rollout + ratio.log(), rollout, adv, of_lengths(2, 3, 1)


P1 = 4e-5  # product of sequence 1


CASES = {
    "token_truncate": ({}, [2.0, 0.5, 2.0, 1e-5, 1.0, 1.1], [1, 1, 1, 1, 1, 1]),
    "token_mask": ({"low": 0.5, "high": 3.0}, [2.0, 0.5, 4.0, 1e-5, 1.0, 1.1], [1, 1, 0, 0, 1, 1]),
    "sequence_truncate": ({"high": 1.05}, [1.0, 1.0, P1, P1, P1, 1.05], [1, 1, 1, 1, 1, 1]),
    "sequence_mask": ({"low": 1e-3, "high": 1.05}, [1.0, 1.0, P1, P1, P1, 1.1], [1, 1, 0, 0, 0, 0]),
    "geometric_reject": ({"low": 0.9, "high": 1.05}, [1.0] * 6, [1, 1, 0, 0, 0, 0]),
    "geometric_truncate": ({"high": 1.05}, [1.0, 1.0, *[P1 ** (1 / 3)] * 3, 1.05], [1] * 6),
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


def test_no_correction_is_none_but_its_inputs_are_checked():
    old, rollout, adv, segments = three_sequences()
    assert correction("none", old, rollout, adv, segments) is None


def test_a_veto_of_zero_drops_nothing():
    old, rollout, adv, segments = three_sequences()
    assert correction("veto", old, rollout, adv, segments, low=0.0).keep.all()


def test_a_correction_carries_no_gradient():
    old, rollout, adv, segments = three_sequences()
    old.requires_grad_()
    for name, (bounds, _, _) in CASES.items():
        got = correction(name, old, rollout, adv, segments, **bounds)
        assert not got.weights.requires_grad
        assert not got.keep.requires_grad


def test_opsm_needs_a_negative_advantage_and_reads_the_current_policy():
    old, rollout, adv, segments = three_sequences()
    assert correction("opsm", old, rollout, adv.abs(), segments).keep.all()
    assert correction("opsm", rollout, rollout, adv, segments).keep.all()
    assert correction("opsm", rollout, rollout, adv, segments, logprobs=old).keep.tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


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
    got = mismatch_metrics(mismatch_stats(q, q, of_lengths(5, 15)))
    one = {"mismatch/ppl_ratio", "mismatch/token_mult_prob_error", "mismatch/ess"}
    for key, value in got.items():
        expected = 1.0 if key in one or key.endswith("correlation") else 0.0
        assert value == pytest.approx(expected, abs=1e-12), key


def test_mismatch_metrics_and_corrections_do_not_depend_on_the_layout():
    t = make_batch(25).tensors()
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
        stats = mismatch_stats(lp[mine], rollout[mine], segments)
        cut = [correction(k, lp[mine], rollout[mine], t.advantages[mine], segments) for k in kinds]
        return mine, stats, cut

    parts = ranks.run(work)
    same_numbers(mismatch_metrics(merge_stats([stats for _, stats, _ in parts])), expected)
    for mine, _, cut in parts:
        for kind, part in zip(kinds, cut, strict=True):
            full = correction(kind, lp, rollout, t.advantages, Segments(t.ids, 9))
            torch.testing.assert_close(part.weights, full.weights[mine], rtol=1e-12, atol=0)
            assert torch.equal(part.keep, full.keep[mine])


@pytest.mark.parametrize("field", ["old_logprobs", "rollout_logprobs", "advantages", "logprobs"])
def test_a_tensor_of_another_length_is_refused_by_name(field):
    old, rollout, adv, segments = three_sequences()
    given = {"old_logprobs": old, "rollout_logprobs": rollout, "advantages": adv, "logprobs": old}
    given[field] = given[field][:2]
    with pytest.raises(ValueError, match=rf"^{field} must be \[N=6\]"):
        correction("opsm", segments=segments, **given)
    if field in ("old_logprobs", "rollout_logprobs"):
        with pytest.raises(ValueError, match=rf"^{field} must be \[N=6\]"):
            mismatch_stats(given["old_logprobs"], given["rollout_logprobs"], segments)


def test_a_value_on_the_bound_is_kept():
    """Numbers that binary floats hold exactly: a drift of .5, a ratio of 1."""
    old, rollout = torch.tensor([-1.0], dtype=F64), torch.tensor([-0.5], dtype=F64)
    bad = torch.tensor([-1.0], dtype=F64)
    assert correction("opsm", old, rollout, bad, of_lengths(1), high=0.5).keep.all()
    assert not correction("opsm", old, rollout, bad, of_lengths(1), high=0.49).keep.any()
    for name in ("token_mask", "sequence_mask", "geometric_reject"):
        assert correction(name, old, old, bad, of_lengths(1), low=1.0, high=1.0).keep.all()


def test_a_mismatch_beyond_the_limit_stays_finite():
    """Exponents are held in [-20, 20]: one broken token neither overflows the weight nor the metrics."""
    old, rollout = torch.tensor([-1.0, -900.0], dtype=F64), torch.tensor([-900.0, -1.0], dtype=F64)
    got = correction("token_mask", old, rollout, torch.ones(2, dtype=F64), of_lengths(2))
    assert got.weights.tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-12)
    metrics = mismatch_metrics(mismatch_stats(old, rollout, of_lengths(2)))
    assert metrics["mismatch/token_mult_prob_error"] == pytest.approx(math.exp(20), rel=1e-12)
    assert all(math.isfinite(value) for value in metrics.values())
