"""Names, legality, bad inputs, user objectives, statistics and the laziness of the package."""

from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import gspo_dist.objectives as package
from gspo_dist.config import ObjectiveConfig
from gspo_dist.metrics.stat import Stat, merge_stats, results
from gspo_dist.objectives import (
    Correction,
    Denominators,
    Objective,
    ObjectiveSpec,
    Segments,
    get_objective,
    legality,
)
from gspo_dist.objectives.losses import Surrogate

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[3]


def test_importing_the_package_and_its_tables_loads_no_torch_nor_numpy():
    code = (
        "import sys, gspo_dist.objectives\n"
        "from gspo_dist.objectives import Clip, OBJECTIVE_SPECS, legality\n"
        "legality.check('gspo', old_logprobs='rollout'); legality.format_table()\n"
        "print(sorted({'torch', 'numpy', 'ray', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_lazy_name_resolves_and_an_unknown_one_does_not():
    for name in dir(package):
        getattr(package, name)
    with pytest.raises(AttributeError, match="gspo_dists"):
        package.gspo_dists  # noqa: B018 - the access is the test


# --- legality ---


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {"objective": "grpo", "old_logprobs": "rollout", "routing_replay": "r2"},
            ["nothing is recorded", "r3"],
        ),
        (
            {"objective": "grpo", "old_logprobs": "rollout", "correction": "token_truncate"},
            ["every weight is 1"],
        ),
        (
            {"objective": "gspo", "old_logprobs": "recompute", "guard_action": "recentre"},
            ["zero by construction"],
        ),
        (
            {"objective": "gspo", "old_logprobs": "recompute", "guard_action": "recompute"},
            ["zero by construction"],
        ),
        ({"objective": "sapo", "old_logprobs": "rollout", "guard_action": "recentre"}, ["no clip"]),
        ({"objective": "gspo", "correction": "sequence_truncate"}, ["exp(sum)", "geometric_reject"]),
        (
            {"objective": "gspo", "aggregation": "token_mean"},
            ["weighs a sequence by its length", "sequence_mean"],
        ),
        (
            {"objective": "gspo", "params": {"clip_low": 0.2, "clip_high": 0.28}},
            ["never binds", "allow_wide_clip"],
        ),
        ({"objective": "gspo_token", "params": {"clip_high": 0.02}}, ["never binds", "3e-4"]),
        ({"objective": "gspo", "old_logprobs": "engine"}, ["old_logprobs", "rollout, recompute"]),
        ({"objective": "gspo", "routing_replay": "r4"}, ["routing_replay", "none, r2, r3"]),
        ({"objective": "gsop"}, ["did you mean 'gspo'"]),
        ({"objective": "gspo", "params": {"clip_lo": 1e-4}}, ["clip_lo", "did you mean 'clip_low'"]),
        ({"objective": "gspo", "advantage": "gae"}, ["advantage", "group_std"]),
        (
            {"objective": "my.module:loss", "old_logprobs": "rollout", "routing_replay": "r2"},
            ["nothing is recorded"],
        ),
    ],
)
def test_illegal_combinations_are_refused_with_reason_and_way_out(kwargs, words):
    with pytest.raises(ValueError) as error:
        legality.check(**kwargs)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"objective": "gspo", "old_logprobs": "rollout", "routing_replay": "r3", "guard_action": "recentre"},
        {"objective": "gspo", "old_logprobs": "rollout", "guard_action": "recompute"},
        {"objective": "gspo", "old_logprobs": "recompute", "routing_replay": "r2", "guard_action": "warn"},
        {"objective": "gspo", "params": {"clip_low": 0.2, "clip_high": 0.28}, "allow_wide_clip": True},
        {"objective": "grpo", "routing_replay": "r2", "correction": "sequence_mask"},
        {"objective": "gmpo", "params": {"clip_low": 0.4, "clip_high": 0.4}},
        {"objective": "gspo", "old_logprobs": "rollout", "correction": "opsm"},
        {"objective": "grpo", "aggregation": "token_mean"},
        {"objective": "my.module:loss", "params": {"anything": 1}},
    ],
)
def test_legal_combinations_pass(kwargs):
    legality.check(**kwargs)


def test_the_printed_table_the_rows_and_check_say_the_same():
    rows = legality.table()
    assert len(rows) == math.prod(len(values) for values in legality.AXES.values())
    verdict = {row.combination: row.rule for row in rows}
    for combination, rule in verdict.items():
        refused = nullcontext() if rule is None else pytest.raises(ValueError, match=f"^{rule.name}: ")
        with refused:
            legality.check(**asdict(combination))
    covered = {}
    for box, rule in legality.collapsed():
        for values in itertools.product(*box.values()):
            combination = legality.Combination(**dict(zip(box, values)))
            assert combination not in covered
            covered[combination] = rule
    assert covered == verdict
    assert len(legality.format_table().split("verdict |\n")[1].splitlines()) == len(legality.collapsed()) + 1


def test_two_broken_rules_are_both_reported():
    with pytest.raises(ValueError) as error:
        legality.check("gspo", old_logprobs="rollout", routing_replay="r2", correction="veto")
    assert len(str(error.value).splitlines()) == 2


def test_default_advantages():
    assert [ObjectiveConfig(name=n).advantage_name for n in ("gspo", "dr_grpo", "reinforce", "a.b:c")] == [
        "group_std", "group_mean", "leave_one_out", "group_std",
    ]  # fmt: skip


# --- get_objective ---


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
"""


def test_a_users_objective_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "user_objectives_for_test.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    lp = torch.tensor([-1.0, -1.0, -2.0], dtype=F64, requires_grad=True)
    adv = torch.tensor([1.0, 1.0, -2.0], dtype=F64)

    def loss(objective):
        segments, denominators = Segments.from_lengths([2, 1]), Denominators(2, 3, 8)
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


# --- inputs of the loss ---


def good():
    lp = torch.tensor([-1.0, -1.5, -0.5], dtype=torch.float32)
    return {
        "logprobs": lp.clone().requires_grad_(), "old_logprobs": lp.clone(), "advantages": torch.ones(3),
        "segments": Segments.from_lengths([2, 1]), "denominators": Denominators(2, 3, 8),
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.tensor([0, 0, 2]), 3), "none for sequence 1 of 3"),
        ((torch.tensor([0, 3]), 3), r"ids must lie in \[0, count=3\): got 0 to 3"),
        ((torch.tensor([-1, 0]), 1), "got -1 to 0"),
        ((torch.tensor([0.0]), 1), "ids must be int64"),
        ((torch.tensor([[0]]), 1), "ids must be int64"),
        ((torch.tensor([0]), 0), "count must be an int >= 1"),
        ((torch.tensor([], dtype=torch.int64), 1), "none for sequence 0"),
    ],
)
def test_bad_segments_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        Segments(*args)


def test_a_sequence_that_is_empty_on_all_ranks_is_refused_and_one_empty_here_is_not():
    here = torch.tensor([0, 0])
    assert Segments(here, 2, lambda x: x + torch.tensor([0.0, 3.0])).lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="none for sequence 1"):
        Segments(here, 2, lambda x: x + torch.tensor([1.0, 0.0]))


def test_segments_by_hand_and_in_any_order():
    s = Segments(torch.tensor([1, 0, 1]), 2)
    x = torch.tensor([1.0, 5.0, 3.0])
    assert s.lengths.tolist() == [1, 2]
    assert s.sum(x).tolist() == [5.0, 4.0]
    assert s.mean(x).tolist() == [5.0, 2.0]
    assert s.expand(torch.tensor([7.0, 8.0])).tolist() == [8.0, 7.0, 8.0]
    assert s.sum(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"expand takes \[S=2\]"):
        s.expand(x)


@pytest.mark.parametrize("field", ["sequences", "tokens", "max_completion_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_denominators_are_refused_by_name(field, value):
    kwargs = {"sequences": 2, "tokens": 4, "max_completion_length": 8, field: value}
    with pytest.raises(ValueError, match=f"denominators.{field}"):
        Denominators(**kwargs)


def test_denominators_need_a_token_per_sequence():
    with pytest.raises(ValueError, match="tokens must be >= sequences"):
        Denominators(5, 4, 8)


# --- statistics ---


def test_merged_statistics_equal_those_of_the_union():
    x = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(1))
    w = torch.rand(50, dtype=F64, generator=torch.Generator().manual_seed(2))
    cuts = (x[:0], x[:7], x[7:8], x[8:]), (w[:0], w[:7], w[7:8], w[8:])
    parts = [
        {"mean": Stat.mean(a, b), "sum": Stat.sum(a), "min": Stat.min(a), "max": Stat.max(a)}
        for a, b in zip(*cuts)
    ]
    merged = merge_stats([{}, *parts])
    assert merged["mean"].result() == pytest.approx(((x * w).sum() / w.sum()).item(), rel=1e-13)
    assert merged["sum"].result() == pytest.approx(x.sum().item(), rel=1e-13)
    assert (merged["min"].result(), merged["max"].result()) == (x.min().item(), x.max().item())


def test_statistics_over_nothing_and_mixed_reductions():
    empty = torch.zeros(0)
    assert math.isnan(Stat.mean(empty).result())
    assert math.isnan(Stat.max(empty).result())
    assert Stat.sum(empty).result() == 0.0
    with pytest.raises(ValueError, match="stat loss must have one reduction: got sum and mean"):
        merge_stats([{"loss": Stat.sum(torch.ones(1))}, {"loss": Stat.mean(torch.ones(1))}])
    with pytest.raises(ValueError, match="stat.reduce"):
        Stat(torch.ones(()), torch.ones(()), "median")


def test_statistics_of_a_loss_by_hand():
    """Sequence 0 (A = 1): ratios 2 and 1, clipped and not; sequence 1 (A = -1): ratio 1/2, clipped."""
    old = torch.zeros(3, dtype=F64)
    lp = torch.tensor([math.log(2), 0.0, math.log(0.5)], dtype=F64)
    adv = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    stats = (
        get_objective("grpo")
        .loss(lp, old, adv, Segments.from_lengths([2, 1]), Denominators(2, 3, 8), offset=0.0)
        .stats
    )
    got = {k.removeprefix("objective/"): v for k, v in results(stats).items()}
    ln2 = math.log(2)
    expected = {
        "clip_fraction": 2 / 3, "clip_fraction_low": 1 / 3, "clip_fraction_high": 1 / 3,
        "clip_fraction_positive": 1 / 2, "clip_fraction_negative": 1.0, "sequence_clip_fraction": 3 / 4,
        "sequence_clip_fraction_positive": 1 / 2, "sequence_clip_fraction_negative": 1.0,
        "approx_kl_k1": 0.0, "approx_kl_k3": (1 - ln2 + 0 + -0.5 + ln2) / 3,
        "ratio_mean": 3.5 / 3, "ratio_min": 0.5, "ratio_max": 2.0,
        "sequence_log_ratio_mean": (ln2 / 2 - ln2) / 2,
        "sequence_log_ratio_square": (ln2**2 / 4 + ln2**2) / 2,
        "advantage_mean": 1 / 3, "tokens": 3.0, "sequences": 2.0, "offset": 0.0,
        "loss": -((1.27 + 1) / 2 - 0.8) / 2, "policy_loss": -((1.27 + 1) / 2 - 0.8) / 2,
    }  # fmt: skip
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key


def test_an_objective_checks_itself():
    with pytest.raises(ValueError, match="aggregation"):
        ObjectiveSpec("mine", "seq_mean")
    with pytest.raises(ValueError, match="no parameter 'b'"):
        Objective(ObjectiveSpec("mine", "token_mean", defaults={"a": 1}), Surrogate, {"b": 2})


def test_concat_keeps_the_items_and_quantiles_of_them_do_not_depend_on_the_split():
    whole = torch.arange(7, dtype=F64)
    parts = [{"v": Stat.concat(whole[:3])}, {"v": Stat.concat(whole[3:])}]
    merged = merge_stats(parts)["v"]
    assert merged.value.tolist() == whole.tolist()
    assert float(merged.weight) == 7
    assert results({"v": merged}) == {}
    with pytest.raises(ValueError, match="holds 7"):
        merged.result()


def test_the_readme_shows_the_legality_table_as_it_is_printed():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    for paragraph in legality.format_table().split("\n\n"):
        assert paragraph.strip() in readme, "README.md is behind `gspo legality`: paste its output"
