"""DPPO, VESPO, LUSPO and M2PO: limits that join them to older objectives, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.objectives import Denominators, get_objective
from gspo_dist.objectives.second_moment import cut, squares
from tests.unit.objectives.cases import F64, extra_of, make_batch, of_lengths, run


def one_token(name, was, now, advantage, **params):
    """(weight of grad log pi, clip fraction) of a token whose probability goes from `was` to `now`."""
    lp = torch.tensor([math.log(now)], dtype=F64, requires_grad=True)
    old = torch.tensor([math.log(was)], dtype=F64)
    result = get_objective(name, **params).loss(
        lp, old, torch.tensor([advantage], dtype=F64), of_lengths(1), Denominators(1, 1, 1)
    )
    result.loss.backward()
    return -lp.grad.item(), result.stats["objective/clip_fraction"].result()


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
@pytest.mark.parametrize("seed", range(4))
def test_dppo_whose_mask_never_binds_is_reinforce_with_its_importance_weight(name, seed):
    batch = make_batch(seed)
    a, b = batch.tensors(), batch.tensors()
    first = run(get_objective(name, delta_low=1e9, delta_high=1e9), a, 9)
    second = run(get_objective("reinforce", aggregation="constant_length"), b, 9)
    first.loss.backward()
    second.loss.backward()
    assert first.loss.item() == second.loss.item()
    assert torch.equal(a.logprobs.grad, b.logprobs.grad)
    assert first.stats["objective/clip_fraction"].result() == 0.0


@pytest.mark.parametrize(
    ("was", "now", "advantage", "weight"),
    [
        (0.50, 0.64, 1.0, 1.28),  # 0.14 up
        (0.50, 0.66, 1.0, 0.0),  # 0.16 up, and A asks for more
        (0.50, 0.66, -1.0, -1.32),  # A asks to come back
        (0.50, 0.36, -1.0, -0.72),
        (0.50, 0.34, -1.0, 0.0),
        (0.50, 0.34, 1.0, 0.68),
        (0.001, 0.1, 1.0, 100.0),  # a rare token: a ratio of 100 is a change of 0.099
    ],
)
def test_dppo_masks_by_the_change_of_the_tokens_own_probability(was, now, advantage, weight):
    got, masked = one_token("dppo_tv", was, now, advantage)
    assert got == pytest.approx(weight, rel=1e-12)
    assert masked == float(weight == 0.0)


def test_dppo_masks_by_the_kl_of_this_token_or_another():
    """KL(.5 | .6) = .02041, KL(.5 | .7) = .08718, KL(.9 | .99) = .14447, by hand."""
    assert one_token("dppo_kl", 0.5, 0.6, 1.0) == (pytest.approx(1.2), 0.0)
    assert one_token("dppo_kl", 0.5, 0.7, 1.0) == (0.0, 1.0)
    assert one_token("dppo_kl", 0.5, 0.7, -1.0) == (pytest.approx(-1.4), 0.0)
    assert one_token("dppo_kl", 0.5, 0.3, -1.0) == (0.0, 1.0)
    for divergence, was, now in ((0.0204110, 0.5, 0.6), (0.0871767, 0.5, 0.7), (0.1444692, 0.9, 0.99)):
        for delta, masked in ((divergence * 1.0001, 0.0), (divergence * 0.9999, 1.0)):
            assert one_token("dppo_kl", was, now, 1.0, delta_high=delta)[1] == masked


def test_dppo_survives_a_probability_that_float32_rounds_to_one():
    for name in ("dppo_tv", "dppo_kl"):
        lp = torch.tensor([0.0, -1e-9, -30.0], requires_grad=True)
        old = torch.tensor([-1e-9, 0.0, 0.0])
        result = get_objective(name).loss(
            lp, old, torch.tensor([1.0, -1.0, -1.0]), of_lengths(3), Denominators(1, 3, 3)
        )
        result.loss.backward()
        assert bool(torch.isfinite(lp.grad).all())
        assert lp.grad[2].item() == 0.0  # from certain to impossible, as A asks


@pytest.mark.parametrize("seed", range(4))
def test_luspo_on_equal_lengths_is_gspo_times_the_length(seed):
    batch = make_batch(seed, sequences=8)
    rng = torch.Generator().manual_seed(seed)
    for values in (batch.lp, batch.old):
        for i, row in enumerate(values):
            values[i] = (row * 5)[:5]
    for row in batch.lp:
        row[0] += 0.01 * float(torch.randn(1, generator=rng))
    a, b = batch.tensors(), batch.tensors()
    clip = {"clip_low": 2e-3, "clip_high": 2.5e-3}
    first, second = run(get_objective("luspo"), a, 8), run(get_objective("gspo", **clip), b, 8)
    first.loss.backward()
    second.loss.backward()
    assert first.loss.item() == pytest.approx(5 * second.loss.item(), rel=1e-13)
    torch.testing.assert_close(a.logprobs.grad, 5 * b.logprobs.grad, rtol=1e-13, atol=0)


def test_luspo_moves_the_tokens_of_a_long_and_a_short_answer_alike():
    lp = torch.full((6,), -1.0, dtype=F64, requires_grad=True)
    advantages = torch.ones(6, dtype=F64)
    get_objective("luspo").loss(
        lp, lp.detach(), advantages, of_lengths(5, 1), Denominators(2, 6, 8)
    ).loss.backward()
    assert lp.grad.tolist() == [-0.5] * 6  # s A / 2; GSPO gives the first five a fifth of it


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [
        (1.0, 1.0, 1.0),
        (1.0, -1.0, 1.0),
        (2.0, 1.0, 4 * math.exp(-3)),
        (2.0, -1.0, 8 * math.exp(-2)),
        (0.5, 1.0, 0.25 * math.exp(1.5)),
        (0.5, -1.0, 0.125 * math.e),
    ],
)
def test_vespo_weighs_a_sequence_by_its_product_ratio(ratio, advantage, weight):
    """W is the product over the tokens: however a log ratio is spread over them, the weight is the same."""
    for shares in ([1.0], [0.5, 0.5], [2.0, -1.5, 0.5]):
        n = len(shares)
        old = torch.full((n,), -1.0, dtype=F64)
        lp = (old + math.log(ratio) * torch.tensor(shares, dtype=F64)).requires_grad_()
        result = get_objective("vespo", aggregation="sequence_sum").loss(
            lp, old, torch.full((n,), advantage, dtype=F64), of_lengths(n), Denominators(1, n, 4)
        )
        result.loss.backward()
        assert (-lp.grad).tolist() == pytest.approx([advantage * weight] * n, rel=1e-12)


def test_vespo_is_largest_at_k_over_lambda_and_vanishes_on_both_sides():
    def weight(log_ratio):
        lp = torch.tensor([log_ratio - 1.0], requires_grad=True)
        get_objective("vespo").loss(
            lp, torch.tensor([-1.0]), torch.ones(1), of_lengths(1), Denominators(1, 1, 1)
        ).loss.backward()
        return -lp.grad.item()

    top = math.log(2 / 3)
    assert weight(top) > max(weight(top - 0.05), weight(top + 0.05))
    assert weight(60.0) == 0.0
    assert 0.0 <= weight(-60.0) < 1e-15


def test_the_cut_of_m2po_by_hand():
    values = torch.tensor([0.25, 0.01, 1.0, 0.04])
    assert cut(values, 0.04) == pytest.approx((0.04 + 0.25) / 2)  # float32 in, means in float64
    assert cut(values, 0.11) == pytest.approx((0.25 + 1.0) / 2)
    assert cut(values, 0.325) == math.inf
    assert cut(torch.tensor([0.5, 0.7]), 0.04) == pytest.approx(0.25)  # none may stay
    assert cut(torch.tensor([0.05, 9.0]), 0.04) == 0.04  # never below the limit
    assert cut(torch.zeros(0), 0.04) == math.inf


def test_equal_squares_go_together():
    """The mean of .02, .06, .06 is .0467: the paper drops one of the two, this rule both."""
    assert cut(torch.tensor([0.02, 0.06, 0.06]), 0.04) == pytest.approx(0.04)
    assert cut(torch.tensor([0.02, 0.06, 0.06]), 0.0467) == math.inf


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_of_m2po_is_the_same_however_the_mini_batch_is_split(seed):
    t = make_batch(seed).tensors()
    whole = extra_of("m2po", t)["second_moment_cut"]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist()
    for parts in ([order], [order[:4], order[4:]], [[i] for i in order]):
        pieces = []
        for sequences in parts:
            take = torch.isin(t.ids, torch.tensor(sequences))
            pieces.append(squares(t.logprobs[take], t.old[take], t.advantages[take]))
        assert cut(torch.cat(pieces), 0.04) == whole
    assert 0.04 <= whole < math.inf
    own = [extra_of("m2po", make_batch(seed, sequences=n).tensors())["second_moment_cut"] for n in (1, 3)]
    assert own != [whole, whole]  # a rule within micro-batches would be another objective


def test_m2po_drops_only_what_moved_as_its_advantage_asks():
    """Squares 1 and 1 of the first two; A of the second asks to come back, so it stays."""
    lp = torch.tensor([0.0, 0.0, -1.1], dtype=F64, requires_grad=True)
    old = torch.full((3,), -1.0, dtype=F64)
    advantages = torch.tensor([1.0, -1.0, -1.0], dtype=F64)
    result = get_objective("m2po").loss(
        lp,
        old,
        advantages,
        of_lengths(1, 1, 1),
        Denominators(3, 3, 1),
        extra={"second_moment_cut": cut(squares(lp, old, advantages), 0.04)},
    )
    result.loss.backward()
    assert lp.grad.tolist() == pytest.approx([0.0, math.e / 3, math.exp(-0.1) / 3], rel=1e-12)
    assert result.stats["objective/clip_fraction_high"].result() == pytest.approx(1 / 3)
    assert result.stats["objective/clip_fraction_low"].result() == 0.0


def test_m2po_refuses_a_part_that_does_not_know_the_whole():
    t = make_batch(0).tensors()
    n = t.ids.numel()
    arguments = (t.logprobs, t.old, t.advantages, of_lengths(n), Denominators(1, n, 1))
    with pytest.raises(ValueError, match=r"m2po reads \['second_moment_cut'\].*got \[\]"):
        get_objective("m2po").loss(*arguments)
    with pytest.raises(ValueError, match=r"keeps every token whose square is below second_moment=0\.04"):
        get_objective("m2po").loss(*arguments, extra={"second_moment_cut": 0.01})
    with pytest.raises(ValueError, match=r"gspo reads \[\].*got \['second_moment_cut'\]"):
        get_objective("gspo").loss(*arguments, extra={"second_moment_cut": 0.05})


@pytest.mark.parametrize("name", ["luspo", "vespo"])
def test_an_objective_of_sequences_refuses_advantages_per_token(name):
    lp = torch.zeros(2, dtype=F64)
    with pytest.raises(ValueError, match=f"constant within a sequence for {name}"):
        get_objective(name).loss(
            lp, lp, torch.tensor([1.0, 2.0], dtype=F64), of_lengths(2), Denominators(1, 2, 2)
        )


@pytest.mark.parametrize(
    ("name", "params"),
    [("dppo_tv", {"delta_low": 0.0}), ("vespo", {"k_positive": -1.0}), ("m2po", {"second_moment": 0.0})],
)
def test_parameters_are_positive(name, params):
    with pytest.raises(ValueError, match=f"objective {name}.{next(iter(params))} must be > 0"):
        get_objective(name, **params)
