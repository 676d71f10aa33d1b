"""Every objective against its formula, its gradient, and the laws that join them."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.objectives import OBJECTIVE_SPECS, Denominators, Segments, get_objective
from tests.unit.objectives.cases import F64, LIMIT, extra_of, make_batch, of_lengths, reference, run

NAMES = list(OBJECTIVE_SPECS)


STOPPED_OF_2026 = ("dppo_tv", "dppo_kl", "vespo")

VARIANTS = [(name, {}) for name in NAMES] + [
    ("luspo", {"clip_low": 0.01, "clip_high": 0.012}),
    ("dppo_tv", {"delta_low": 0.02, "delta_high": 0.05}),
    ("dppo_kl", {"delta_low": 0.002, "delta_high": 0.005}),
    ("vespo", {"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.3, "lambda_negative": 1.7}),
    ("m2po", {"second_moment": 0.01}),
    ("score_centering", {"weight_cap": 1.1}),
    ("gspo", {"clip_low": 0.01, "clip_high": 0.012}),
    ("grpo", {"dual_clip": 1.4, "clip_low": 0.1, "clip_high": 0.15}),
    ("cispo", {"clip_low": 0.2, "clip_high": 0.2}),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.2}),
    ("sapo", {"tau_positive": 3.0, "tau_negative": 5.0}),
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_value_and_gradient_equal_the_loops_of_the_paper(name, params, seed):
    batch = make_batch(seed)
    t = batch.tensors()
    objective = get_objective(name, **params)
    result = run(objective, t, len(batch.lp))
    result.loss.backward()
    loss, grad = reference(name, objective.spec.aggregation, objective.resolved, batch, LIMIT)
    assert math.isclose(result.loss.item(), loss, rel_tol=1e-12, abs_tol=1e-13)
    torch.testing.assert_close(t.logprobs.grad, torch.tensor(grad, dtype=F64), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("cispo", "minirl", "reinforce", "gspo_token", *STOPPED_OF_2026)]
)
def test_gradcheck(name):
    batch = make_batch(11, sequences=4, longest=5)
    t = batch.tensors()
    objective = get_objective(name)
    assert torch.autograd.gradcheck(
        lambda lp: (
            objective.loss(
                lp,
                t.old,
                t.advantages,
                Segments(t.ids, 4),
                Denominators(4, t.ids.numel(), LIMIT),
                extra=extra_of(name, t),
            ).loss
        ),
        (t.logprobs,),
        eps=1e-7,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", ["cispo", "minirl", "reinforce", "gspo_token"])
def test_stopped_gradient_objectives_against_central_differences_of_the_frozen_form(name):
    """With the weights frozen at theta the loss is sum_t c_t log pi_t (gspo_token: c_t pi_t / sg[pi_t])."""
    batch = make_batch(12, sequences=5)
    t = batch.tensors()
    objective = get_objective(name)
    segments, denominators = Segments(t.ids, 5), Denominators(5, t.ids.numel(), LIMIT)
    result = objective.loss(t.logprobs, t.old, t.advantages, segments, denominators)
    result.loss.backward()
    lp0 = t.logprobs.detach()
    surrogate = objective.surrogate(lp0, t.old, t.advantages, segments, **objective.resolved)
    ratio, hit = surrogate.ratio, surrogate.clipped_low | surrogate.clipped_high
    if name == "cispo":
        ratio = ratio.clamp(1 - objective.resolved["clip_low"], 1 + objective.resolved["clip_high"])
    else:
        ratio = ratio.masked_fill(hit, 0.0)
    length = segments.lengths.to(F64)[t.ids]
    scale = {"cispo": 1 / t.ids.numel(), "gspo_token": 1 / (5 * length)}.get(name, 1 / 5)

    def frozen(lp):
        term = torch.exp(lp - lp0) if name == "gspo_token" else lp
        return (-scale * ratio * t.advantages * term).sum()

    h = 1e-6
    for k in range(t.ids.numel()):
        step = torch.zeros_like(lp0)
        step[k] = h
        numeric = (frozen(lp0 + step) - frozen(lp0 - step)) / (2 * h)
        assert math.isclose(numeric.item(), t.logprobs.grad[k].item(), rel_tol=1e-7, abs_tol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_gspo_is_gspo_token_for_constant_advantages(seed):
    batch = make_batch(seed, sequences=12)
    a, b = batch.tensors(), batch.tensors()
    first = run(get_objective("gspo"), a, 12)
    second = run(get_objective("gspo_token"), b, 12)
    first.loss.backward()
    second.loss.backward()
    assert abs(first.loss.item() - second.loss.item()) < 1e-12
    torch.testing.assert_close(a.logprobs.grad, b.logprobs.grad, rtol=1e-12, atol=1e-12)
    for name in ("clip_fraction_positive", "clip_fraction_negative", "sequence_clip_fraction"):
        key = f"objective/{name}"
        assert first.stats[key].result() == pytest.approx(second.stats[key].result(), nan_ok=True)


def test_gspo_token_with_advantages_per_token_clips_token_by_token():
    """s = exp((.3 + .1) / 2) = e^.2, above 1.0004: A > 0 is clipped, A < 0 keeps its gradient s A / |y|."""
    lp = torch.tensor([-1.0, -1.0], dtype=F64, requires_grad=True)
    old = torch.tensor([-1.3, -1.1], dtype=F64)
    adv = torch.tensor([2.0, -3.0], dtype=F64)
    result = get_objective("gspo_token").loss(lp, old, adv, of_lengths(2), Denominators(1, 2, 4))
    result.loss.backward()
    s = math.exp(0.2)
    assert result.loss.item() == pytest.approx(-(1.0004 * 2 - 3 * s) / 2, rel=1e-13)
    torch.testing.assert_close(lp.grad, torch.tensor([0.0, 3 * s / 2], dtype=F64), rtol=1e-13, atol=0)


def test_gspo_refuses_advantages_per_token_and_names_the_sequence():
    lp = torch.zeros(4, dtype=F64)
    adv = torch.tensor([1.0, 1.0, 2.0, 3.0], dtype=F64)
    for name in ("gspo", "gmpo"):
        with pytest.raises(ValueError, match=r"advantages must be constant.*sequence 1.*gspo_token"):
            get_objective(name).loss(lp, lp, adv, of_lengths(2, 2), Denominators(2, 4, 4))


def test_gradients_of_gspo_and_grpo_coincide_at_ratio_one():
    batch = make_batch(5)
    grads = []
    for name in ("gspo", "gspo_token", "grpo", "gmpo", "sapo"):
        t = batch.tensors()
        t.logprobs = t.old.clone().requires_grad_()
        run(get_objective(name), t, 9).loss.backward()
        grads.append(t.logprobs.grad)
    n = torch.tensor(batch.lengths, dtype=F64)[t.ids]
    for grad in grads:  # eq 10 = eq 12 at w = s = 1
        torch.testing.assert_close(grad, -t.advantages / (9 * n), rtol=1e-13, atol=1e-15)


def test_unclipped_gradients_are_equations_10_and_12():
    batch = make_batch(7, noise=0.02)
    n = torch.tensor(batch.lengths, dtype=F64)
    for name in ("gspo", "grpo"):
        t = batch.tensors()
        run(get_objective(name, clip_low=0.9, clip_high=9.0, allow_wide_clip=True), t, 9).loss.backward()
        w = torch.exp(t.logprobs.detach() - t.old)
        log_s = torch.stack([(t.logprobs.detach() - t.old)[t.ids == i].mean() for i in range(9)])
        weight = w if name == "grpo" else torch.exp(log_s)[t.ids]
        torch.testing.assert_close(
            t.logprobs.grad, -weight * t.advantages / (9 * n[t.ids]), rtol=1e-12, atol=1e-15
        )


# One sequence of one token: token and sequence ratios coincide, so one table serves every clipped objective.
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo", "grpo", "dapo", "dr_grpo", "gmpo", "minirl"])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_clip_takes_the_gradient_only_where_the_sign_says_so(name, side, sign):
    objective = get_objective(name)
    low, high = objective.resolved["clip_low"], objective.resolved["clip_high"]
    log_space = OBJECTIVE_SPECS[name].clip == "log"
    bound = (
        (-low if log_space else math.log1p(-low)) if side < 0 else (high if log_space else math.log1p(high))
    )
    for factor, outside in ((0.99, False), (1.01, True)):
        lp = torch.tensor([bound * factor - 1.0], dtype=F64, requires_grad=True)
        old, adv = torch.tensor([-1.0], dtype=F64), torch.tensor([sign], dtype=F64)
        result = objective.loss(lp, old, adv, of_lengths(1), Denominators(1, 1, 1))
        result.loss.backward()
        binds = outside and side == sign
        assert (lp.grad.item() == 0.0) == binds
        assert result.stats["objective/clip_fraction"].result() == float(binds)
        mine, other = ("positive", "negative") if sign > 0 else ("negative", "positive")
        assert result.stats[f"objective/clip_fraction_{mine}"].result() == float(binds)
        assert math.isnan(result.stats[f"objective/clip_fraction_{other}"].result())
        at = "low" if side < 0 else "high"
        assert result.stats[f"objective/clip_fraction_{at}"].result() == float(binds)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_cispo_clips_the_weight_on_both_sides_and_never_the_gradient(sign):
    objective = get_objective("cispo", clip_low=0.2, clip_high=0.3)
    for ratio, weight, counted in (
        (0.5, 0.8, 1.0),
        (0.79, 0.8, 1.0),
        (0.81, 0.81, 0.0),
        (1.29, 1.29, 0.0),
        (1.31, 1.3, 1.0),
        (2.0, 1.3, 1.0),
    ):
        lp = torch.tensor([math.log(ratio) - 1], dtype=F64, requires_grad=True)
        result = objective.loss(
            lp,
            torch.tensor([-1.0], dtype=F64),
            torch.tensor([sign], dtype=F64),
            of_lengths(1),
            Denominators(1, 1, 1),
        )
        result.loss.backward()
        assert lp.grad.item() == pytest.approx(-sign * weight, rel=1e-14)
        assert result.stats["objective/clip_fraction"].result() == counted


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    objective = get_objective("grpo", dual_clip=3.0)
    lp = torch.tensor([math.log(5.0), math.log(2.0)], dtype=F64, requires_grad=True)
    adv = torch.tensor([-1.0, -1.0], dtype=F64)
    zeros = torch.zeros(2, dtype=F64)
    result = objective.loss(lp, zeros, adv, of_lengths(2), Denominators(1, 2, 2))
    result.loss.backward()
    assert result.loss.item() == pytest.approx((3.0 + 2.0) / 2)
    torch.testing.assert_close(lp.grad, torch.tensor([0.0, 1.0], dtype=F64))
    assert result.stats["objective/clip_fraction_high"].result() == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_zero_advantage_gives_zero_gradient_and_a_broken_token_stays_finite(name):
    lp = torch.tensor([-0.1, -0.1, -0.1], dtype=torch.float32, requires_grad=True)
    old = torch.tensor([-0.2, -0.2, -400.0])
    reads = {"second_moment_cut": math.inf, "router_shift": torch.tensor([1.0, 0.9, 0.2])}
    reads["expected_score"] = torch.tensor([-0.1, -2.0, -300.0])
    extra = {read: reads[read] for read in OBJECTIVE_SPECS[name].reads}
    result = get_objective(name).loss(
        lp, old, torch.zeros(3), of_lengths(1, 2), Denominators(2, 3, 4), extra=extra
    )
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert lp.grad.abs().max().item() == 0.0
    lp = lp.detach().requires_grad_()
    adv = torch.tensor([1.0, -1.0, -1.0])
    result = get_objective(name).loss(lp, old, adv, of_lengths(1, 2), Denominators(2, 3, 4), extra=extra)
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    assert bool(torch.isfinite(lp.grad).all())


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo", "gmpo", "minirl"])
def test_tokens_without_advantage_never_count_as_clipped(name):
    lp = torch.tensor([2.0, -2.0, 2.0], dtype=F64)
    adv = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    result = get_objective(name).loss(
        lp, torch.zeros(3, dtype=F64), adv, of_lengths(1, 1, 1), Denominators(3, 3, 1)
    )
    assert result.stats["objective/clip_fraction"].result() == pytest.approx(1 / 3)
    assert result.stats["objective/clip_fraction_low"].result() == 0.0


def test_float32_is_fine_enough_for_the_clip_of_gspo_at_32k_tokens():
    """The error of a float32 sequence ratio stays below a hundredth of the clip width, 3e-4."""
    rng = torch.Generator().manual_seed(9)
    lengths = [32768, 30000, 20011, 517]
    segments = of_lengths(*lengths)
    old = -6 * torch.rand(sum(lengths), generator=rng)
    lp = old + 0.03 * torch.randn(sum(lengths), generator=rng)
    adv, denominators = torch.ones_like(lp), Denominators(4, sum(lengths), 32768)
    coarse = get_objective("gspo").loss(lp, old, adv, segments, denominators)
    fine = get_objective("gspo").loss(lp.double(), old.double(), adv.double(), segments, denominators)
    for key in ("ratio_min", "ratio_max", "ratio_mean", "sequence_log_ratio_mean"):
        a, b = (r.stats[f"objective/{key}"].result() for r in (coarse, fine))
        assert abs(a - b) < 3e-6, key


def test_gspo_agrees_with_liger_and_so_does_grpo():
    """An independent implementation, from hidden states; its float32 limits the agreement."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rng = torch.Generator().manual_seed(0)
    rows, width, hidden, vocab = 6, 11, 16, 23
    h0 = torch.randn(rows, width, hidden, generator=rng)
    weight = torch.randn(vocab, hidden, generator=rng)
    tokens = torch.randint(vocab, (rows, width), generator=rng)
    mask = torch.arange(width)[None] < torch.tensor([11, 3, 7, 1, 9, 5])[:, None]
    adv = torch.tensor([1.0, -0.5, 0.3, -1.2, 0.7, -0.3])
    level = {"gspo": "sequence", "grpo": "token"}
    for name, clip in (("gspo", (3e-4, 4e-4)), ("gspo", (0.01, 0.015)), ("grpo", (0.2, 0.27))):
        ours, theirs = h0.clone().requires_grad_(), h0.clone().requires_grad_()
        full = torch.log_softmax(ours @ weight.T, -1).gather(-1, tokens[..., None])[..., 0]
        noise = 0.05 * torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        old = full.detach() + noise
        ids = torch.arange(rows)[:, None].expand(rows, width)[mask]
        result = get_objective(name, clip_low=clip[0], clip_high=clip[1]).loss(
            full[mask], old[mask], adv[ids], Segments(ids, rows), Denominators(rows, int(mask.sum()), width)
        )
        result.loss.backward()
        liger = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=False,
            use_ref_model=False,
            epsilon_low=clip[0],
            epsilon_high=clip[1],
            loss_type="grpo",
            importance_sampling_level=level[name],
        )
        other, metrics = liger(theirs, weight, tokens, mask.long(), adv, None, old_per_token_logps=old)
        other.backward()
        assert result.loss.item() == pytest.approx(other.item(), abs=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        assert result.stats["objective/clip_fraction"].result() == pytest.approx(metrics[-1].item(), abs=1e-6)
        assert 0 < result.stats["objective/clip_fraction"].result() < 1 or name == "grpo"
