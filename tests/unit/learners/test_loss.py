"""From log-probs to the loss of one micro-batch: offsets, corrections, refusals, fillers, mismatch."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.config import CorrectionConfig
from gspo_dist.learners.loss import InexactError, LossSpec, micro_batch_loss, trained_index
from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.objectives import Denominators, get_objective
from gspo_dist.types import PackedBatch

# Two sequences, 3 and 4 tokens long, of which the last 2 and the last 3 are trained.
MASK = [False, True, True, False, True, True, True]
ROLLOUT = [0.0, -1.0, -2.0, 0.0, -0.5, -1.5, -1.0]
ADVANTAGES = [0.0, 1.0, 1.0, 0.0, -2.0, -2.0, -2.0]
LOGPROBS = [-0.9, -2.1, -0.6, -1.2, -1.3]  # of the trained tokens; log ratios +.1 -.1 | -.1 +.3 -.3


def batch(**changes):
    fields = {
        "token_ids": torch.arange(7),
        "position_ids": torch.tensor([0, 1, 2, 0, 1, 2, 3]),
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32),
        "loss_mask": torch.tensor(MASK),
        "advantages": torch.tensor(ADVANTAGES),
        "rollout_logprobs": torch.tensor(ROLLOUT),
        "rollout_index": torch.tensor([41, 17]),
    }
    return PackedBatch(**{**fields, **changes})


def spec(name="reinforce", **changes):
    """REINFORCE without a clip: token loss -r A log pi, summed per sequence, mean over 2 sequences."""
    return LossSpec(get_objective(name), Denominators(2, 5, 8), **changes)


def run(packed, loss_spec, logprobs=LOGPROBS, **kwargs):
    leaf = torch.tensor(logprobs, requires_grad=True)
    loss, stats = micro_batch_loss(leaf, torch.full_like(leaf, 0.7), packed, loss_spec, **kwargs)
    loss.backward()
    return loss.item(), leaf.grad.tolist(), stats


def expected(ratios, weights=(1.0,) * 5):
    """Loss and gradient of `spec()` from the ratios of the 5 trained tokens."""
    advantages = (1.0, 1.0, -2.0, -2.0, -2.0)
    grad = [-w * r * a / 2 for w, r, a in zip(weights, ratios, advantages, strict=True)]
    return sum(g * lp for g, lp in zip(grad, LOGPROBS, strict=True)), grad


def test_trained_tokens_are_found_in_packed_order():
    assert trained_index(batch()).tolist() == [1, 2, 4, 5, 6]


def test_a_trained_first_token_is_refused_with_its_sequence():
    mask = torch.tensor([False, True, True, True, True, True, True])
    with pytest.raises(ValueError, match="sequence 1 of the micro-batch starts with a trained token"):
        trained_index(batch(loss_mask=mask))


def test_the_engines_logprobs_are_the_old_policy_unless_others_were_recomputed():
    loss, grad, _ = run(batch(), spec())
    ratios = [math.exp(x) for x in (0.1, -0.1, -0.1, 0.3, -0.3)]
    assert (loss, grad) == (pytest.approx(expected(ratios)[0], rel=1e-6), pytest.approx(expected(ratios)[1]))
    old = torch.tensor([0.0, -0.9, -2.1, 0.0, -0.6, -1.2, -1.3])
    loss, grad, _ = run(batch(old_logprobs=old), spec())  # the current policy itself: every ratio is 1
    assert (loss, grad) == (pytest.approx(expected([1.0] * 5)[0]), pytest.approx(expected([1.0] * 5)[1]))


def test_an_offset_is_taken_out_of_every_log_ratio():
    loss, grad, stats = run(batch(), spec(offset=0.2))
    ratios = [math.exp(x - 0.2) for x in (0.1, -0.1, -0.1, 0.3, -0.3)]
    assert loss == pytest.approx(expected(ratios)[0], rel=1e-6)
    assert grad == pytest.approx(expected(ratios)[1], rel=1e-6)
    assert results(stats)["objective/offset"] == pytest.approx(0.2)


def test_the_own_mean_is_that_over_sequences_of_their_mean_log_ratio():
    """Sequence means are 0 and -1/30, so the offset is -1/60; the mean over tokens would be -.02."""
    loss, _, stats = run(batch(), spec(own_mean=True))
    assert results(stats)["objective/offset"] == pytest.approx(-1 / 60, rel=1e-5)
    assert loss == pytest.approx(run(batch(), spec(offset=-1 / 60))[0], rel=1e-6)


def test_without_an_offset_none_is_taken_out():
    assert results(run(batch(), spec())[2])["objective/offset"] == 0.0


def test_an_offset_and_the_own_mean_exclude_each_other():
    with pytest.raises(ValueError, match=r"got offset=0\.1 and own_mean=True; leave one of them out"):
        spec(offset=0.1, own_mean=True)


def test_a_correction_weighs_old_against_engine_and_its_bounds_reach_it():
    """old - engine: .5, 0 | -.2, 0, .1. Truncated at 1.5, exp(.5) = 1.65 weighs 1.5."""
    old = torch.tensor([0.0, -0.5, -2.0, 0.0, -0.7, -1.5, -0.9])
    truncate = CorrectionConfig("token_truncate", high=1.5)
    loss, grad, stats = run(batch(old_logprobs=old), spec(correction=truncate))
    ratios = [math.exp(x) for x in (-0.4, -0.1, 0.1, 0.3, -0.4)]
    weights = [1.5, 1.0, math.exp(-0.2), 1.0, math.exp(0.1)]
    assert loss == pytest.approx(expected(ratios, weights)[0], rel=1e-6)
    assert grad == pytest.approx(expected(ratios, weights)[1], rel=1e-6)
    assert results(stats)["objective/correction_weight_mean"] == pytest.approx(sum(weights) / 5, rel=1e-6)
    mask = CorrectionConfig("token_mask", low=0.9, high=1.2)
    _, grad, stats = run(batch(old_logprobs=old), spec(correction=mask))
    assert [g == 0.0 for g in grad] == [True, False, True, False, False]
    assert results(stats)["objective/correction_keep_fraction"] == pytest.approx(3 / 5)


def test_opsm_reads_the_current_policy():
    """Sequence 1 has A < 0 and has drifted by mean(engine - current) = 1/30 nats."""
    for bound, dropped in ((0.03, True), (0.04, False)):
        _, grad, _ = run(batch(), spec(correction=CorrectionConfig("opsm", high=bound)))
        assert [g == 0.0 for g in grad] == [False, False, dropped, dropped, dropped]


def test_without_a_correction_nothing_is_weighed_and_nothing_is_counted():
    _, _, stats = run(batch(), spec())
    assert not [name for name in stats if "correction" in name]


def test_a_kl_term_reads_the_reference_logprobs():
    reference = torch.tensor([0.0, -1.0, -2.0, 0.0, -0.5, -1.5, -1.0])
    loss_spec = LossSpec(get_objective("reinforce", kl_coef=2.0, kl_estimator="k2"), Denominators(2, 5, 8))
    loss, _, stats = run(batch(ref_logprobs=reference), loss_spec)
    kl = [0.5 * x * x for x in (0.1, -0.1, -0.1, 0.3, -0.3)]
    assert results(stats)["objective/kl_loss"] == pytest.approx(2.0 * sum(kl) / 2, rel=1e-5)
    assert loss == pytest.approx(run(batch(), spec())[0] + sum(kl), rel=1e-6)


@pytest.mark.parametrize(("token", "rollout"), [(1, 41), (3, 17)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logprob_that_is_not_finite_names_its_rollout(token, rollout, value):
    broken = [*LOGPROBS[:token], value, *LOGPROBS[token + 1 :]]
    message = f"logprobs of rollout {rollout} are not finite: {value} at trained token {token}"
    with pytest.raises(FloatingPointError, match=message):
        run(batch(), spec(), broken)


def test_a_loss_that_is_not_finite_names_the_rollouts():
    huge = torch.tensor([0.0, 3e38, 3e38, 0.0, -2.0, -2.0, -2.0])
    with pytest.raises(FloatingPointError, match=r"loss is inf in a micro-batch of rollouts \[41, 17\]"):
        run(batch(advantages=huge), spec())


def test_a_filler_runs_backward_and_adds_nothing():
    nobody = batch(loss_mask=torch.zeros(7, dtype=torch.bool))
    leaf = torch.ones(3, requires_grad=True)
    loss, stats = micro_batch_loss(leaf[:0], leaf[:0], nobody, spec())
    loss.backward()
    assert loss.item() == 0.0
    assert stats == {}
    assert leaf.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_context_parallel_rank_without_a_token_takes_part():
    """It must enter the sums over ranks, which the others wait for; here they add the other rank's counts."""
    calls = []

    def all_reduce(x):
        calls.append(x)
        return x + 1.0 if x.dtype == torch.float64 else x

    empty, none = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss, stats = micro_batch_loss(empty, empty, batch(), spec(), index=none, all_reduce=all_reduce)
    assert calls
    assert loss.item() == 0.0
    assert results(stats)["objective/tokens"] == 0.0


def test_an_index_takes_its_tokens_only():
    """Sums of the losses and merges of the statistics give those of the whole."""
    whole, grad, stats = run(batch(), spec(measure_mismatch=True))
    lengths = torch.tensor([2.0, 3.0], dtype=torch.float64)
    parts = []
    for at in ([0, 2], [1, 3, 4]):
        index, local = torch.tensor([1, 2, 4, 5, 6])[at], [LOGPROBS[i] for i in at]

        def others(x):
            return lengths if x.dtype == torch.float64 else x  # only the counts matter to REINFORCE

        parts.append(run(batch(), spec(), local, index=index, all_reduce=others))
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-6)
    assert [parts[0][1][0], parts[1][1][0], parts[0][1][1], *parts[1][1][1:]] == pytest.approx(grad, rel=1e-6)
    merged = results(merge_stats([part[2] for part in parts]))
    for name in ("objective/loss", "objective/tokens", "objective/ratio_max", "objective/entropy"):
        assert merged[name] == pytest.approx(results(stats)[name], rel=1e-6)


def test_the_entropy_of_the_trained_tokens_is_reported():
    assert results(run(batch(), spec())[2])["objective/entropy"] == pytest.approx(0.7)


def test_the_mismatch_is_measured_from_recomputed_logprobs_or_else_from_this_pass():
    assert not [name for name in run(batch(), spec())[2] if name.startswith("mismatch/")]
    current = results(run(batch(), spec(measure_mismatch=True))[2])
    assert current["mismatch/kl"] == pytest.approx(0.02, rel=1e-5)  # -(mean of .1 -.1 -.1 .3 -.3)
    assert current["mismatch/abs_log_ratio_max"] == pytest.approx(0.3, rel=1e-6)
    old = torch.tensor([0.0, -0.5, -2.0, 0.0, -0.7, -1.5, -0.9])
    recomputed = results(run(batch(old_logprobs=old), spec(measure_mismatch=True))[2])
    assert recomputed["mismatch/kl"] == pytest.approx(-0.08, rel=1e-5)  # -(mean of .5 0 -.2 0 .1)
    assert recomputed["mismatch/abs_log_ratio_max"] == pytest.approx(0.5, rel=1e-6)


def test_an_exact_run_stops_at_the_first_token_that_differs_and_names_it():
    """Equal but for the last token: place 3 of the second sequence, which is rollout 17."""
    agreed = [ROLLOUT[i] for i in (1, 2, 4, 5, 6)]
    exact = spec(measure_mismatch=True, exact=True)
    run(batch(), exact, agreed)
    moved = [*agreed[:4], agreed[4] + 1e-6]
    with pytest.raises(
        InexactError, match=r"1 of 5 tokens, first on token 3 of rollout 17: -1\.0 and -0\.99999"
    ):
        run(batch(), exact, moved)
    run(batch(), spec(measure_mismatch=True), moved)  # off
    run(batch(), spec(exact=True), moved)  # a later mini-batch: the policy has moved


def test_an_exact_run_compares_recomputed_log_probs_too():
    old = torch.tensor([0.0, -1.0, -2.0, 0.0, -0.5, -1.5, -1.25])
    with pytest.raises(
        InexactError, match=r"1 of 5 tokens, first on token 3 of rollout 17: -1\.0 and -1\.25 nats"
    ):
        run(batch(old_logprobs=old), spec(measure_mismatch=True, exact=True))


def test_an_exact_run_compares_fresh_tokens_only():
    versions = torch.tensor([-1, 6, 6, -1, 8, 8, 6])
    exact = spec(measure_mismatch=True, exact=True, policy_version=8)
    run(batch(policy_versions=versions), exact, [-9.0, -9.0, -0.5, -1.5, -9.0])
    with pytest.raises(InexactError, match=r"first on token 2 of rollout 17"):
        run(batch(policy_versions=versions), exact, [-1.0, -2.0, -0.5, -9.0, -1.0])
