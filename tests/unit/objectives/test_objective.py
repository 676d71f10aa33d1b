"""The loss that a learner calls: terms, statistics and inputs, under any layout; and objectives by name."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.objectives import (
    OBJECTIVES,
    Clip,
    Correction,
    Denominators,
    Objective,
    ObjectiveSpec,
    Segments,
    Surrogate,
    get_objective,
)
from gspo_dist.objectives.offset import GuardConfig, make_guard
from gspo_dist.objectives.specs import OBJECTIVE_SPECS
from tests.unit.objectives.cases import (
    F64,
    Ranks,
    extra_of,
    make_batch,
    of_lengths,
    part_of,
    run,
    same_numbers,
)

ROOT = Path(__file__).resolve().parents[3]
NAMES = list(OBJECTIVE_SPECS)

# --- the terms of the loss ---


def test_offset_recentres_the_log_ratio():
    batch = make_batch(2)
    for name in NAMES:
        a, b = batch.tensors(), batch.tensors()
        first = run(get_objective(name), a, 9, offset=-0.07)
        b.old = b.old - 0.07
        second = run(get_objective(name), b, 9)
        first.loss.backward()
        second.loss.backward()
        assert first.loss.item() == pytest.approx(second.loss.item(), rel=1e-13)
        torch.testing.assert_close(a.logprobs.grad, b.logprobs.grad, rtol=1e-13, atol=0)
        raw = first.stats["objective/sequence_log_ratio_mean"].result()
        shifted = second.stats["objective/sequence_log_ratio_mean"].result()
        assert raw == pytest.approx(shifted - 0.07, abs=1e-13)


def test_weights_multiply_and_keep_zeroes_without_touching_the_denominator():
    lp = torch.tensor([-1.0, -1.0, -1.0], dtype=F64, requires_grad=True)
    weights = torch.tensor([2.0, 0.5, 1.0], dtype=F64, requires_grad=True)
    keep = torch.tensor([True, True, False])
    result = get_objective("dapo").loss(
        lp,
        lp.detach(),
        torch.tensor([1.0, 1.0, 4.0], dtype=F64),
        of_lengths(2, 1),
        Denominators(2, 3, 4),
        correction=Correction(weights, keep),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-(2.0 + 0.5) / 3)
    torch.testing.assert_close(lp.grad, torch.tensor([-2.0, -0.5, 0.0], dtype=F64) / 3)
    assert weights.grad is None
    assert result.stats["objective/correction_keep_fraction"].result() == pytest.approx(2 / 3)
    assert result.stats["objective/correction_weight_mean"].result() == pytest.approx(3.5 / 3)


def test_kl_term_uses_the_aggregation_of_the_objective_and_ignores_keep():
    lp = torch.tensor([-1.0, -2.0, -1.5], dtype=F64, requires_grad=True)
    ref = torch.tensor([-1.2, -1.9, -1.0], dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    result = get_objective("grpo", kl_coef=0.1, kl_estimator="k2").loss(
        lp,
        lp.detach(),
        zero,
        of_lengths(2, 1),
        Denominators(2, 3, 4),
        ref_logprobs=ref,
        correction=Correction(torch.ones(3), torch.tensor([False, True, True])),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.1 * ((0.04 + 0.01) / 4 + 0.25 / 2) / 2)
    torch.testing.assert_close(lp.grad, 0.1 * torch.tensor([0.2 / 4, -0.1 / 4, -0.5 / 2], dtype=F64))


def test_only_logprobs_gets_a_gradient():
    t = make_batch(1).tensors()
    t.old.requires_grad_()
    t.advantages = t.advantages.clone().requires_grad_()
    for name in NAMES:
        run(get_objective(name), t, 9).loss.backward()
    assert t.old.grad is None
    assert t.advantages.grad is None
    assert t.logprobs.grad is not None


def test_statistics_of_a_loss_by_hand():
    """Sequence 0 (A = 1): ratios 2 and 1, clipped and not; sequence 1 (A = -1): ratio 1/2, clipped."""
    old = torch.zeros(3, dtype=F64)
    lp = torch.tensor([math.log(2), 0.0, math.log(0.5)], dtype=F64)
    adv = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    stats = (
        get_objective("grpo").loss(lp, old, adv, of_lengths(2, 1), Denominators(2, 3, 8), offset=0.0).stats
    )
    got = {k.removeprefix("objective/"): v for k, v in results(stats).items()}
    ln2 = math.log(2)
    expected = {
        "clip_fraction": 2 / 3,
        "clip_fraction_low": 1 / 3,
        "clip_fraction_high": 1 / 3,
        "clip_fraction_positive": 1 / 2,
        "clip_fraction_negative": 1.0,
        "sequence_clip_fraction": 3 / 4,
        "sequence_clip_fraction_positive": 1 / 2,
        "sequence_clip_fraction_negative": 1.0,
        "approx_kl_k1": 0.0,
        "approx_kl_k3": (1 - ln2 + 0 + -0.5 + ln2) / 3,
        "ratio_mean": 3.5 / 3,
        "ratio_min": 0.5,
        "ratio_max": 2.0,
        "sequence_log_ratio_mean": (ln2 / 2 - ln2) / 2,
        "sequence_log_ratio_square": (ln2**2 / 4 + ln2**2) / 2,
        "advantage_mean": 1 / 3,
        "tokens": 3.0,
        "sequences": 2.0,
        "offset": 0.0,
        "loss": -((1.27 + 1) / 2 - 0.8) / 2,
        "policy_loss": -((1.27 + 1) / 2 - 0.8) / 2,
    }
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key


# --- its inputs ---


def good():
    lp = torch.tensor([-1.0, -1.5, -0.5], dtype=torch.float32)
    return {
        "logprobs": lp.clone().requires_grad_(),
        "old_logprobs": lp.clone(),
        "advantages": torch.ones(3),
        "segments": of_lengths(2, 1),
        "denominators": Denominators(2, 3, 8),
    }


@pytest.mark.parametrize(
    "field", ["logprobs", "old_logprobs", "advantages", "ref_logprobs", "weights", "keep"]
)
@pytest.mark.parametrize("problem", ["shape", "type", "nan"])
def test_bad_tensors_are_refused_by_name(field, problem):
    kwargs = good()
    base = torch.ones(3, dtype=torch.bool) if field == "keep" else torch.full((3,), -1.0)

    def put(value):
        if field in ("weights", "keep"):
            both = {"weights": torch.ones(3), "keep": torch.ones(3, dtype=torch.bool), field: value}
            kwargs["correction"] = Correction(**both)
        else:
            kwargs[field] = value

    if problem == "shape":
        message = rf"^{field} must be \[N=3\].*\[2\]"
        put(base[:2])
    elif problem == "type":
        message = rf"^{field} must be .*bfloat16"
        put(base.to(torch.bfloat16))
    elif field == "keep":
        return
    else:
        put(base.index_fill(0, torch.tensor([2]), -math.inf))
        message = rf"^{field} must be finite: got -inf at token 2 of sequence 1"
    with pytest.raises(ValueError, match=message):
        get_objective("grpo").loss(**kwargs)


def test_missing_reference_and_bad_offset_are_refused():
    with pytest.raises(ValueError, match="ref_logprobs are needed"):
        get_objective("grpo", kl_coef=0.1).loss(**good())
    with pytest.raises(ValueError, match="offset must be a finite number"):
        get_objective("grpo").loss(**good(), offset=math.nan)


# --- any layout of the mini-batch gives the same value, gradient and statistics ---


def whole(name, t, count):
    lp = t.logprobs.detach().clone().requires_grad_()
    result = get_objective(name).loss(
        lp,
        t.old,
        t.advantages,
        Segments(t.ids, count),
        Denominators(count, t.ids.numel(), 64),
        offset=0.01,
        extra=extra_of(name, t, 0.01),
    )
    result.loss.backward()
    return result.loss.item(), lp.grad, results(result.stats)


@pytest.mark.parametrize("name", NAMES)
def test_packing_order_does_not_matter(name):
    t = make_batch(21).tensors()
    loss, grad, stats = whole(name, t, 9)
    order = torch.randperm(t.ids.numel(), generator=torch.Generator().manual_seed(0))
    relabel = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    lp = t.logprobs.detach()[order].clone().requires_grad_()
    result = get_objective(name).loss(
        lp,
        t.old[order],
        t.advantages[order],
        Segments(relabel[t.ids[order]], 9),
        Denominators(9, t.ids.numel(), 64),
        offset=0.01,
        extra=part_of(extra_of(name, t, 0.01), order),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(lp.grad, grad[order], rtol=1e-12, atol=1e-15)
    same_numbers(results(result.stats), stats)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layout",
    [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[0], [1, 2, 3, 4, 5, 6, 7, 8]], [[8, 2], [0, 7, 5], [1, 3, 4, 6]]],
)
def test_micro_batches_and_data_parallel_ranks_add_up(name, layout):
    """A micro-batch and a data-parallel rank are the same thing here: some sequences, global denominators."""
    t = make_batch(22).tensors()
    loss, grad, stats = whole(name, t, 9)
    total, pieces, parts = 0.0, torch.zeros_like(grad), []
    for sequences in layout:
        take = torch.isin(t.ids, torch.tensor(sequences))
        local = torch.tensor([sequences.index(int(i)) for i in t.ids[take]])
        lp = t.logprobs.detach()[take].clone().requires_grad_()
        result = get_objective(name).loss(
            lp,
            t.old[take],
            t.advantages[take],
            Segments(local, len(sequences)),
            Denominators(9, t.ids.numel(), 64),
            offset=0.01,
            extra=part_of(extra_of(name, t, 0.01), take),
        )
        result.loss.backward()
        total += result.loss.item()
        pieces[take] = lp.grad
        parts.append(result.stats)
    assert total == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(pieces, grad, rtol=1e-12, atol=1e-15)
    same_numbers(results(merge_stats(parts)), stats)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [2, 3])
def test_a_context_parallel_cut_does_not_matter(name, world):
    """Random owners: some ranks hold nothing of some sequences; one-token sequences are empty on all but
    one."""
    t = make_batch(23).tensors()
    loss, grad, stats = whole(name, t, 9)
    owner = torch.randint(world, t.ids.shape, generator=torch.Generator().manual_seed(4))
    ranks = Ranks(world)

    def work(rank):
        mine = owner == rank
        lp = t.logprobs.detach()[mine].clone().requires_grad_()
        result = get_objective(name).loss(
            lp,
            t.old[mine],
            t.advantages[mine],
            Segments(t.ids[mine], 9, ranks.differentiable(rank)),
            Denominators(9, t.ids.numel(), 64),
            offset=0.01,
            extra=part_of(extra_of(name, t, 0.01), mine),
        )
        result.loss.backward()
        return mine, result, lp.grad

    pieces, total = torch.zeros_like(grad), 0.0
    parts = ranks.run(work)
    for mine, part, local_grad in parts:
        pieces[mine] = local_grad
        total += part.loss.item()
    same_numbers(results(merge_stats([part.stats for _, part, _ in parts])), stats)
    assert total == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(pieces, grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_a_single_token_takes_part(name):
    t = make_batch(24).tensors()
    loss, grad, stats = whole(name, t, 9)
    ranks = Ranks(2)

    def work(rank):
        mine = torch.full_like(t.ids, rank == 0, dtype=torch.bool)
        lp = t.logprobs.detach()[mine].clone().requires_grad_()
        result = get_objective(name).loss(
            lp,
            t.old[mine],
            t.advantages[mine],
            Segments(t.ids[mine], 9, ranks.differentiable(rank)),
            Denominators(9, t.ids.numel(), 64),
            offset=0.01,
            extra=part_of(extra_of(name, t, 0.01), mine),
        )
        result.loss.backward()
        return result, lp.grad

    (full, g), (empty, none) = ranks.run(work)
    assert full.loss.item() == pytest.approx(loss, rel=1e-12)
    assert empty.loss.item() == 0.0
    assert none.numel() == 0
    torch.testing.assert_close(g, grad, rtol=1e-12, atol=1e-15)
    same_numbers(results(merge_stats([full.stats, empty.stats])), stats)


@pytest.mark.slow
def test_two_real_processes_with_cut_sequences_give_the_same_loss_gradient_and_stats(tmp_path):
    t = make_batch(26, sequences=6).tensors()
    place = torch.cat([torch.arange(int(n)) for n in torch.bincount(t.ids)])
    half = (torch.bincount(t.ids)[t.ids] + 1) // 2
    data = {
        "logprobs": t.logprobs.detach(),
        "old": t.old,
        "advantages": t.advantages,
        "ids": t.ids,
        "count": 6,
        "owner": (place >= half).long(),
        "objectives": NAMES,
        "offset": 0.01,
        "extra": {name: extra_of(name, t, 0.01) for name in NAMES},
    }
    torch.save(data, tmp_path / "in.pt")
    worker = Path(__file__).with_name("cp_worker.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(worker),
                str(r),
                "2",
                str(tmp_path / "meet"),
                str(tmp_path / "in.pt"),
                str(tmp_path / f"out{r}.pt"),
            ],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        errors = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], errors
    outs = [torch.load(tmp_path / f"out{r}.pt", weights_only=False) for r in range(2)]
    for name in NAMES:
        loss, grad, stats = whole(name, t, 6)
        got = torch.zeros_like(grad)
        for r, out in enumerate(outs):
            got[data["owner"] == r] = out[name]["grad"]
        same_numbers(results(merge_stats([out[name]["stats"] for out in outs])), stats)
        assert sum(out[name]["loss"].item() for out in outs) == pytest.approx(loss, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)


# --- objectives by name ---


def test_every_name_is_bound_to_its_function_and_spec():
    assert list(OBJECTIVES) == NAMES
    for name, objective in OBJECTIVES.items():
        assert objective.surrogate.__name__ == name
        assert objective.spec == OBJECTIVE_SPECS[name]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("gsop", {}, "objective.*did you mean 'gspo'"),
        ("gspo", {"clip_hgh": 1e-4}, "clip_hgh.*did you mean 'clip_high'"),
        ("gspo", {"clip_low": -3e-4}, "gspo.clip_low must be > 0"),
        ("gspo", {"clip_high": 0.0}, "gspo.clip_high must be > 0"),
        ("gspo", {"clip_low": 4e-4, "clip_high": 3e-4}, "clip_low must be <= clip_high.*swapped"),
        ("grpo", {"clip_low": 0.8, "clip_high": 1.2}, "distances, not bounds.*clip_low=0.2, clip_high=0.2"),
        ("gspo", {"clip_low": 0.9997, "clip_high": 1.0004}, "distances, not bounds"),
        ("gspo", {"clip_low": "3e-4"}, "clip_low must be a finite number"),
        ("grpo", {"clip_high": math.nan}, "clip_high must be a finite number"),
        ("cispo", {"clip_low": 1.5}, "clip_low must be <= 1"),
        ("grpo", {"dual_clip": 1.2}, r"dual_clip must be > 1 \+ clip_high"),
        ("sapo", {"tau_negative": 0.0}, "tau_negative must be > 0"),
        ("sapo", {"clip_low": 0.2}, "sapo has no parameter 'clip_low'"),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.27}, "allow_wide_clip"),
        ("gspo", {"aggregation": "token_mean"}, "keeps its aggregation"),
        ("grpo", {"aggregation": "mean"}, "aggregation"),
        ("grpo", {"kl_coef": -0.1}, "kl_coef"),
        ("grpo", {"kl_estimator": "k4"}, "kl_estimator"),
        ("no.such.module:loss", {}, "must import as package.module:NAME"),
        ("math:pi", {"aggregation": "token_mean"}, "must be an Objective or a function"),
    ],
)
def test_bad_objectives_are_refused_by_name(name, params, message):
    with pytest.raises(ValueError, match=message):
        get_objective(name, **params)


def test_wide_clip_by_insistence_and_bound_parameters():
    objective = get_objective("gspo", clip_low=0.2, clip_high=0.27, allow_wide_clip=True)
    assert objective.resolved == {"clip_low": 0.2, "clip_high": 0.27}
    assert objective.spec.sequence_level
    assert get_objective("gspo").resolved == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert pickle.loads(pickle.dumps(objective)) == objective


USER = """
import torch
from gspo_dist.objectives import Objective, ObjectiveSpec, Surrogate

def plain(logprobs, old_logprobs, advantages, segments, *, scale=2.0):
    ratio = torch.exp(logprobs - old_logprobs)
    no = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(-scale * ratio * advantages, ratio.detach(), no, no)

def needy(logprobs, old_logprobs, advantages, segments, *, scale):
    return plain(logprobs, old_logprobs, advantages, segments, scale=scale)

WHOLE = Objective(ObjectiveSpec("whole", "sequence_sum", "group_mean", {"scale": 3.0}), plain)

def clipped(logprobs, old_logprobs, advantages, segments, *, clip_low=0.4, clip_high=0.5):
    return plain(logprobs, old_logprobs, advantages, segments)

LOG_CLIP = Objective(
    ObjectiveSpec("log_clip", "sequence_mean", clip="log", aggregations=("sequence_mean",),
                  defaults={"clip_low": 2.0, "clip_high": 0.5}),
    clipped,
)
WIDE = Objective(
    ObjectiveSpec("wide", "sequence_mean", sequence_level=True, defaults={"clip_low": 0.4, "clip_high": 0.5}),
    clipped,
)
"""


def test_a_users_objective_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "user_objectives_for_test.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    lp = torch.tensor([-1.0, -1.0, -2.0], dtype=F64, requires_grad=True)
    adv = torch.tensor([1.0, 1.0, -2.0], dtype=F64)

    def loss(objective):
        segments, denominators = of_lengths(2, 1), Denominators(2, 3, 8)
        return objective.loss(lp, lp.detach(), adv, segments, denominators).loss.item()

    path = "user_objectives_for_test"
    assert loss(get_objective(f"{path}:WHOLE")) == pytest.approx(-3.0 * (2 - 2) / 2)
    bare = get_objective(f"{path}:plain", aggregation="sequence_mean", scale=5.0)
    assert loss(bare) == pytest.approx(-5.0 * (1 - 2) / 2)
    assert get_objective(f"{path}:WHOLE", aggregation="token_mean").spec.aggregation == "token_mean"
    with pytest.raises(ValueError, match="owns no aggregation"):
        get_objective(f"{path}:plain")
    with pytest.raises(ValueError, match="parameter 'scale' needs a default"):
        get_objective(f"{path}:needy", aggregation="token_mean")
    with pytest.raises(ValueError, match="did you mean 'scale'"):
        get_objective(f"{path}:WHOLE", scal=1.0)
    with pytest.raises(ValueError, match="must import"):
        get_objective(f"{path}:missing")


def test_an_objective_checks_itself():
    with pytest.raises(ValueError, match="aggregation"):
        ObjectiveSpec("mine", "seq_mean")
    with pytest.raises(ValueError, match="no parameter 'b'"):
        Objective(ObjectiveSpec("mine", "token_mean", defaults={"a": 1}), Surrogate, {"b": 2})


def test_an_objective_carries_its_clip():
    assert get_objective("gspo").clip == Clip(3e-4, 4e-4)
    assert get_objective("grpo", clip_high=0.5).clip == Clip(0.2, 0.5)
    assert get_objective("gmpo").clip == Clip(0.4, 0.4, log_space=True)
    assert get_objective("sapo").clip is None
    assert get_objective("reinforce").clip is None


def test_a_users_spec_binds_as_a_built_in_one_does(tmp_path, monkeypatch):
    """Clip in log space, aggregation and sequence level are read from the user's own objective."""
    (tmp_path / "user_specs_for_test.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = get_objective("user_specs_for_test:LOG_CLIP")  # 2.0 would be refused as a distance from ratio 1
    assert own.clip == Clip(2.0, 0.5, log_space=True)
    assert make_guard(GuardConfig(), own.clip).clip.widths(-1.0) == -0.5
    assert get_objective("user_specs_for_test:WHOLE").clip is None
    bare = get_objective("user_specs_for_test:clipped", aggregation="token_mean", clip_high=0.6)
    assert bare.clip == Clip(0.4, 0.6)
    with pytest.raises(ValueError, match="log_clip keeps its aggregation"):
        get_objective("user_specs_for_test:LOG_CLIP", aggregation="token_mean")
    with pytest.raises(ValueError, match="wide clips a sequence ratio"):
        get_objective("user_specs_for_test:WIDE")
    assert get_objective("user_specs_for_test:WIDE", allow_wide_clip=True).resolved["clip_high"] == 0.5
    with pytest.raises(ValueError, match=r"user_specs_for_test:WIDE\.clip_low must be > 0"):
        get_objective("user_specs_for_test:WIDE", clip_low=0.0)


def test_the_advantage_estimator_is_the_objectives_own_unless_another_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "user_advantage_for_test.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_objective("dr_grpo").spec.advantage == "group_mean"
    assert get_objective("dr_grpo", advantage="none").spec.advantage == "none"
    assert get_objective("user_advantage_for_test:WHOLE").spec.advantage == "group_mean"
    with pytest.raises(ValueError, match="objective gspo: advantage must be a known name: got 'gae'"):
        get_objective("gspo", advantage="gae")


def test_the_kl_is_measured_without_a_coefficient_and_added_with_one():
    """d = .5 on one token: k1 = .5, k2 = .125, k3 = exp(-.5) - .5."""
    lp, ref = torch.tensor([-1.0], dtype=F64), torch.tensor([-1.5], dtype=F64)
    one, k3 = torch.ones(1, dtype=F64), math.exp(-0.5) - 0.5
    for estimator, value in (("k1", 0.5), ("k2", 0.125), ("k3", k3)):
        for coefficient in (0.0, 0.2):
            objective = get_objective("grpo", kl_coef=coefficient, kl_estimator=estimator)
            result = objective.loss(lp, lp, one, of_lengths(1), Denominators(1, 1, 1), ref_logprobs=ref)
            assert result.loss.item() == pytest.approx(-1.0 + coefficient * value, rel=1e-12)
            got = results(result.stats)
            assert got["objective/kl_reference"] == pytest.approx(value, rel=1e-12)
            assert got["objective/policy_loss"] == -1.0
            assert got["objective/loss"] == pytest.approx(-1.0 + coefficient * value, rel=1e-12)
            if coefficient:
                assert got["objective/kl_loss"] == pytest.approx(coefficient * value, rel=1e-12)
            else:
                assert "objective/kl_loss" not in got


def test_a_token_that_is_not_kept_may_have_an_infinite_weight_of_nothing():
    """keep takes the token out even where its loss would overflow."""
    lp = torch.tensor([0.0, 0.0], dtype=torch.float32, requires_grad=True)
    correction = Correction(torch.tensor([1.0, 3e38]), torch.tensor([True, False]))
    adv = torch.tensor([1.0, 100.0])
    result = get_objective("dapo").loss(
        lp, lp.detach(), adv, of_lengths(2), Denominators(1, 2, 2), correction=correction
    )
    result.loss.backward()
    assert result.loss.item() == -0.5
    assert lp.grad.tolist() == [-0.5, 0.0]
