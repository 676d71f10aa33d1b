"""Flip measures against sets in plain Python, their merging, and their history."""

import numpy as np
import pytest
import torch

from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.flips import FlipHistory, flip_stats, sample_sequences
from gspo_dist.routing.trace import RoutingTrace


def brute(a, b):
    """[rows, L]: 1 - |A n B| / K by sets in plain Python, over the rows known in both."""
    rows = [t for t in range(len(a)) if a.known[t] and b.known[t]]
    flips = np.zeros((len(rows), a.num_layers))
    for i, t in enumerate(rows):
        for layer in range(a.num_layers):
            common = set(a.expert_ids[t, layer].tolist()) & set(b.expert_ids[t, layer].tolist())
            flips[i, layer] = 1 - len(common) / a.top_k
    return flips


@pytest.mark.parametrize(("top_k", "experts"), [(1, 4), (2, 8), (8, 16), (5, 300)])
def test_flips_agree_with_python_sets(random_trace, top_k, experts):
    a, b = (random_trace(s, tokens=40, layers=4, top_k=top_k, experts=experts) for s in (1, 2))
    a.known[3], b.known[7] = False, False
    flips = brute(a, b)
    got = flip_stats(a, b)
    np.testing.assert_allclose(got.by_layer, flips.mean(0), rtol=1e-12)
    assert got.rows == 38
    numbers = results(got.stats())
    assert numbers["routing/flip_fraction"] == pytest.approx(flips.mean(), rel=1e-12)
    assert numbers["routing/router_flip_fraction"] == pytest.approx((flips > 0).mean(), rel=1e-12)
    assert numbers["routing/token_flip_fraction"] == pytest.approx((flips > 0).any(1).mean(), rel=1e-12)
    assert numbers["routing/flips_per_token"] == pytest.approx((flips > 0).sum(1).mean(), rel=1e-12)
    assert got.fraction == pytest.approx(flips.mean(), rel=1e-12)
    assert results(got.layer_stats())["routing/flip_fraction/layer_02"] == pytest.approx(flips[:, 2].mean())


def test_two_random_routings_differ_as_the_hypergeometric_mean_says(random_trace):
    """E|A n B| = K * K / E for independent choices: flip = 1 - K / E = 0.75 for 2 of 8."""
    a, b = (random_trace(s, tokens=20000, layers=2) for s in (1, 2))
    assert flip_stats(a, b).fraction == pytest.approx(0.75, abs=0.005)


def test_the_worked_example_one_expert_of_eight_exchanged_everywhere():
    ids = np.tile(np.arange(8, dtype=np.uint8), (5, 6, 1))
    other = ids.copy()
    other[..., 3] = 100
    known = np.ones(5, np.bool_)
    numbers = results(flip_stats(RoutingTrace(ids, known, 128), RoutingTrace(other, known, 128)).stats())
    assert list(numbers.values()) == [0.125, 1.0, 1.0, 6.0]


def test_order_within_a_row_is_not_a_flip(random_trace):
    a = random_trace(1, top_k=5)
    b = RoutingTrace(a.expert_ids[..., ::-1].copy(), a.known, 8)
    got = flip_stats(a, b)
    assert (got.fraction, got.tokens, got.routers.sum()) == (0.0, 0, 0)


def test_parts_merge_to_the_whole(random_trace):
    a, b = (random_trace(s, tokens=30) for s in (1, 2))
    parts = [flip_stats(a[part], b[part]) for part in (slice(0, 4), slice(4, 30))]
    whole = flip_stats(a, b)
    np.testing.assert_allclose((parts[0] + parts[1]).by_layer, whole.by_layer, rtol=1e-12)
    merged = results(merge_stats([p.stats() for p in parts]))
    assert merged == pytest.approx(results(whole.stats()), rel=1e-12)
    rows = np.arange(30) >= 4
    assert flip_stats(a, b, rows).fraction == pytest.approx(parts[1].fraction, rel=1e-12)


def test_nothing_compared_is_nan_and_merges_as_nothing(random_trace):
    a, b = (random_trace(s, tokens=6) for s in (1, 2))
    empty = flip_stats(a, b, np.zeros(6, np.bool_))
    assert np.isnan(empty.by_layer).all()
    assert results(merge_stats([empty.stats(), flip_stats(a, b).stats()])) == results(
        flip_stats(a, b).stats()
    )


def test_traces_of_other_tokens_are_refused(random_trace):
    with pytest.raises(ValueError, match="same tokens"):
        flip_stats(random_trace(0), random_trace(0)[:5])


def test_an_update_of_the_weights_flips_and_no_update_does_not(make_model, tokens):
    model = make_model(0)

    def trace():
        with torch.no_grad(), routers.record(model) as recorder:
            model(tokens, use_cache=False)
        return recorder.trace()

    before = trace()
    assert flip_stats(before, trace()).fraction == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    assert 0.0 < flip_stats(before, trace()).fraction < 0.75


def test_sampled_sequences_depend_on_the_set_the_seed_and_the_step_only():
    ids = list(range(100, 164))
    chosen = sample_sequences(ids, 8, seed=1, step=5)
    assert len(set(chosen)) == 8
    assert set(chosen) <= set(ids)
    assert chosen == sorted(chosen)
    assert chosen == sample_sequences(ids[::-1], 8, seed=1, step=5)
    assert chosen != sample_sequences(ids, 8, seed=1, step=6)
    assert chosen != sample_sequences(ids, 8, seed=2, step=5)
    assert sample_sequences(ids[:3], 8, seed=1, step=5) == ids[:3]
    with pytest.raises(ValueError, match="at least 1"):
        sample_sequences(ids, 0, seed=1, step=5)
    hits = np.bincount([i for step in range(2000) for i in sample_sequences(range(16), 4, seed=0, step=step)])
    assert abs(hits / 2000 - 0.25).max() < 0.05


def test_history_survives_the_disk(tmp_path):
    history = FlipHistory(3)
    for step, row in [(0, [0.1, 0.2, 0.3]), (0, [0.0, 0.5, 1.0]), (4, [np.nan] * 3)]:
        history.append(step, np.array(row))
    history.save(tmp_path / "flips.npz")
    again = FlipHistory.load(tmp_path / "flips.npz")
    assert len(again) == 3
    np.testing.assert_array_equal(again.steps, [0, 0, 4])
    np.testing.assert_array_equal(again.rates, history.rates)
    FlipHistory(3).save(tmp_path / "empty.npz")
    assert FlipHistory.load(tmp_path / "empty.npz").num_layers == 3


def test_rows_out_of_order_or_of_another_length_are_refused():
    history = FlipHistory(3)
    history.append(4, np.zeros(3))
    with pytest.raises(ValueError, match=r"in order: got step 3 after 4"):
        history.append(3, np.zeros(3))
    with pytest.raises(ValueError, match=r"\[3\]: got \[2\]"):
        history.append(5, np.zeros(2))
    assert len(history) == 1
