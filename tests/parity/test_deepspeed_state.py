"""Routing replay, resuming, precision and failures of the DeepSpeed learner, on two real ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_dist.learners.deepspeed.stored import stored_weights
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.weights.folder import ModelFolder
from tests.parity import deepspeed_case as case
from tests.parity.ranks import run_ranks

pytestmark = pytest.mark.timeout(1200)  # the first test pays for every launch
WORKER = Path(__file__).parent / "deepspeed_worker.py"
ROUTED = {
    "routes_zero3": {"deepspeed": {"zero_stage": 3}},
    "routes_experts2": {"deepspeed": {"zero_stage": 2, "expert_parallel": 2}},
    "routes_experts3_checkpointed": {
        "deepspeed": {"zero_stage": 3, "expert_parallel": 2},
        "activation_checkpointing": True,
    },
}
RESUMED = {
    "resume_zero0": {"deepspeed": {"zero_stage": 0}},
    "resume_zero2": {"deepspeed": {"zero_stage": 2}},
    "resume_zero3": {"deepspeed": {"zero_stage": 3}},
    "resume_experts2": {"deepspeed": {"zero_stage": 2, "expert_parallel": 2}},
    "resume_experts3": {"deepspeed": {"zero_stage": 3, "expert_parallel": 2}},
    "resume_bf16_zero1": {"deepspeed": {"zero_stage": 1}, "precision": "bf16"},
    "resume_fp16_zero2": {"deepspeed": {"zero_stage": 2}, "precision": "fp16"},
    "resume_bf16_experts3": {"deepspeed": {"zero_stage": 3, "expert_parallel": 2}, "precision": "bf16"},
}
ACCEPTED = {
    "accepted_zero0": {"deepspeed": {"zero_stage": 0}},
    "accepted_zero2": {"deepspeed": {"zero_stage": 2}},
    "accepted_zero3": {"deepspeed": {"zero_stage": 3}},
    "accepted_experts2": {"deepspeed": {"zero_stage": 2, "expert_parallel": 2}},
}
BROKEN = {
    f"broken_{name}": dict(deepspeed=ds, **more)
    for name, ds, more in (
        ("zero0", {"zero_stage": 0}, {}),
        ("zero1_bf16", {"zero_stage": 1}, {"precision": "bf16"}),
        ("zero2", {"zero_stage": 2}, {}),
        ("zero2_fp16", {"zero_stage": 2}, {"precision": "fp16"}),
        ("zero3_fp16", {"zero_stage": 3}, {"precision": "fp16"}),
        ("zero3", {"zero_stage": 3}, {}),
        ("experts3", {"zero_stage": 3, "expert_parallel": 2}, {}),
    )
}
BF16 = {f"bf16_zero{stage}": {"deepspeed": {"zero_stage": stage}, "precision": "bf16"} for stage in range(4)}
FP16 = {f"fp16_zero{n}": {"deepspeed": {"zero_stage": n}, "precision": "fp16"} for n in (1, 2, 3)}
REFERENCED = {
    "referenced_bf16_experts1": {"deepspeed": {"zero_stage": 1, "expert_parallel": 2}, "precision": "bf16"},
    "referenced_fp16_zero2": {"deepspeed": {"zero_stage": 2}, "precision": "fp16"},
}
BF16_EXPERTS = {
    f"bf16_experts{stage}": {"deepspeed": {"zero_stage": stage, "expert_parallel": 2}, "precision": "bf16"}
    for stage in (1, 2, 3)
}


WRONG = {f"wrong_zero{stage}": {"deepspeed": {"zero_stage": stage}} for stage in range(4)}
GONE, NEW = "model.layers.1.self_attn.q_norm.weight", "model.layers.7.self_attn.q_norm.weight"


def wrong_folder(model: Path, folder: Path, name: str) -> Path:
    """A copy of the model with one tensor less, or with one that it has no place for."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    if name == "lacks":
        del weights[GONE]
    else:
        weights[NEW] = weights[GONE].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_eager(model: Path, precision: str = "fp32", **changes: Any) -> EagerLearner:
    config = case.make_config(backend="eager", precision=precision, **changes)
    return EagerLearner(config, model, total_steps=6, temperature=0.8)


def random_traces(batches: list, seed: int) -> list[RoutingTrace]:
    """Experts that no router would choose, with some rows unknown."""
    rng = np.random.default_rng(seed)
    out = []
    for batch in batches:
        scores = rng.random((batch.num_tokens, 3, 8))
        known = rng.random(batch.num_tokens) > 0.2
        out.append(RoutingTrace(np.argsort(scores, -1)[..., :2].astype(np.uint8), known, 8))
    return out


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One launch of all cases, and the eager learner's answers where a case has one."""
    model = case.make_model(tmp_path_factory.mktemp("moe"))
    data = case.near_policy(make_eager(model), case.make_mini_batches())
    traces = [random_traces(rank, r) for r, rank in enumerate(data[0].micro_batches)]

    eager = make_eager(model)
    plain = [o.routing for rank in data[0].micro_batches for o in eager.logprobs(rank, record_routing=True)]
    given = [
        b.with_(routing=t)
        for rank, ts in zip(data[0].micro_batches, traces, strict=True)
        for b, t in zip(rank, ts, strict=True)
    ]
    outputs = eager.logprobs(given, record_routing=True)
    stats = eager.forward_backward(given, case.make_spec(data[0]))
    norm = eager.optim_step().grad_norm
    routed = {
        "plain": plain,
        "outputs": outputs,
        "stats": stats,
        "grad_norm": norm,
        "weights": case.exported(eager),
    }

    halves = {}
    for precision in ("bf16", "fp16"):
        half = make_eager(model, precision)
        start = case.exported(half)
        steps = case.train(half, data, [0, 1])
        halves[precision] = {"steps": steps, "weights": case.exported(half), "start": start}

    fixed = make_eager(model, "bf16")  # routes fixed: a flipped route moves a bf16 log-prob by tenths
    fixed_outputs = fixed.logprobs(given)
    fixed.forward_backward(given, case.make_spec(data[0]))
    fixed_run = {"outputs": fixed_outputs, "grad_norm": fixed.optim_step().grad_norm}

    going_on = make_eager(model)
    case.train(going_on, data[:2], [0, 1])
    folder = tmp_path_factory.mktemp("going_on")
    going_on.save(folder)
    changed = make_eager(model, optimizer=case.OTHER_OPTIMIZER)
    changed.load(folder)
    accepted_run = {"steps": case.train(changed, data[2:], [0, 1]), "weights": case.exported(changed)}

    wrong = {n: wrong_folder(model, tmp_path_factory.mktemp(n), n) for n in ("lacks", "extra")}
    cases = {
        name: wrong
        | {
            "do": do,
            "config": config,
            "model": model,
            "data": data,
            "traces": traces,
            "kl_coef": 0.1 if group is REFERENCED else 0.0,
            "folder": tmp_path_factory.mktemp(name) / "checkpoint",
        }
        for do, group in (
            ("routes", ROUTED),
            ("resume", RESUMED),
            ("accepted", ACCEPTED),
            ("broken", BROKEN),
            ("train", BF16 | FP16),
            ("train", REFERENCED),
            ("routes", BF16_EXPERTS),
            ("wrong_weights", WRONG),
            ("other_layout", {"other_layout": {"deepspeed": {"zero_stage": 1}}}),
        )
        for name, config in group.items()
    }
    got = run_ranks(WORKER, {"cases": cases}, 2)
    return {
        "got": got,
        "model": model,
        "folders": {name: spec["folder"] for name, spec in cases.items()},
        "traces": traces,
        "routed": routed,
        **halves,
        "fixed": fixed_run,
        "accepted": accepted_run,
    }


def both(lab: dict, name: str, field: str) -> list:
    """A list of each rank, end to end: the order of the eager learner's micro-batches."""
    return [x for rank in lab["got"] for x in rank[name][field]]


@pytest.mark.parametrize("name", ROUTED)
def test_recorded_routes_equal_eager(lab: dict, name: str) -> None:
    for got, want in zip(both(lab, name, "recorded"), lab["routed"]["plain"], strict=True):
        assert np.array_equal(np.sort(got.expert_ids, -1), np.sort(want.expert_ids, -1))
        assert got.known.all()


@pytest.mark.parametrize("name", ROUTED)
def test_replayed_routes_are_used_and_unknown_rows_are_native(lab: dict, name: str) -> None:
    traces = [t for rank in lab["traces"] for t in rank]
    outputs = lab["routed"]["outputs"]
    for got, given, eager in zip(both(lab, name, "replayed"), traces, outputs, strict=True):
        assert np.array_equal(got.expert_ids[given.known], given.expert_ids[given.known])
        native = np.sort(got.expert_ids[~given.known], -1)
        assert np.array_equal(native, np.sort(eager.routing.expert_ids[~given.known], -1))


@pytest.mark.parametrize("name", ROUTED)
def test_a_step_under_replay_equals_eager(lab: dict, name: str) -> None:
    want = lab["routed"]
    for got, output in zip(both(lab, name, "logprobs"), want["outputs"], strict=True):
        torch.testing.assert_close(got, output.logprobs, rtol=1e-5, atol=1e-5)
    merged = results(merge_stats([rank[name]["stats"] for rank in lab["got"]]))
    assert merged == pytest.approx(results(want["stats"]), rel=1e-4, abs=1e-6)
    assert lab["got"][0][name]["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    for key, weight in want["weights"].items():
        assert (lab["got"][0][name]["weights"][key] - weight).norm() <= 1e-5 * weight.norm(), key


@pytest.mark.parametrize("name", ROUTED)
def test_a_truncated_trace_is_refused(lab: dict, name: str) -> None:
    for rank in lab["got"]:
        assert "one row per token" in rank[name]["error"]


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_equals_not_stopping_bit_for_bit(lab: dict, name: str) -> None:
    for r, rank in enumerate(lab["got"]):
        seen = rank[name]
        assert seen["version"] == 2
        assert torch.equal(seen["noise_on"], seen["noise_back"]), "random state"
        for on, back in zip(seen["on"], seen["back"], strict=True):
            assert all(on[key] == back[key] for key in ("grad_norm", "lr", "version", "loss_scale"))
            for a, b in zip(on["logprobs"], back["logprobs"], strict=True):
                assert torch.equal(a, b)
        # The worker lowered it before the save: a learner that begins anew has 65,536.
        assert seen["back"][0]["loss_scale"] == (512.0 if "fp16" in name else None)
        assert bool(seen["weights_on"]) == (r == 0)
        assert seen["weights_on"].keys() == seen["weights_back"].keys()
        for key, weight in seen["weights_on"].items():
            assert torch.equal(weight, seen["weights_back"][key]), key
        assert seen["several"].keys() == lab["got"][0][name]["weights_on"].keys()  # on both ranks
        assert all(torch.equal(seen["several"][k], w) for k, w in lab["got"][0][name]["weights_on"].items())


@pytest.mark.parametrize("name", RESUMED)
def test_the_files_alone_give_the_saved_weights_bit_for_bit(lab: dict, name: str) -> None:
    """Up to ZeRO 2 without any file of the optimiser. ZeRO 3 has its weights there and nowhere else."""
    folder = lab["folders"][name]
    if RESUMED[name]["deepspeed"]["zero_stage"] < 3:
        for path in folder.glob("deepspeed/*optim_states.pt"):
            path.unlink()
    want = lab["got"][0][name]["weights_saved"]
    got = dict(stored_weights(folder, ModelFolder(lab["model"])))
    assert got.keys() == want.keys()
    for key, weight in want.items():
        assert got[key].dtype == weight.dtype
        assert torch.equal(got[key], weight), key


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_resume_with_other_settings_steps_with_them_as_eager_does(lab: dict, name: str) -> None:
    """tests/unit/learners/test_eager.py holds eager's step to the formula."""
    other, want = case.OTHER_OPTIMIZER, lab["accepted"]
    for r, rank in enumerate(lab["got"]):
        seen = rank[name]
        for group in seen["groups"]:
            assert (tuple(group["betas"]), group["eps"]) == (other.betas, other.eps)
            assert (group["weight_decay"], group["lr"]) == (other.weight_decay, want["steps"][-1]["lr"])
        for got, step in zip(seen["steps"], want["steps"], strict=True):
            assert got["lr"] == step["lr"]
            assert got["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-5)
            assert step["grad_norm"] > other.grad_clip, "clipping must bite"
        if r == 0:
            assert seen["weights"].keys() == want["weights"].keys()
            for key, weight in want["weights"].items():
                assert (seen["weights"][key] - weight).norm() <= 1e-5 * weight.norm(), key


@pytest.mark.parametrize("name", RESUMED)
def test_a_folder_without_a_state_is_refused_on_every_rank(lab: dict, name: str) -> None:
    for rank in lab["got"]:
        assert rank[name]["refused"].startswith("no DeepSpeed checkpoint in ")


def test_a_state_of_another_layout_is_refused_with_both_values(lab: dict) -> None:
    for rank in lab["got"]:
        seen = rank["other_layout"]
        assert "learner.deepspeed.zero_stage was 1 and is 3" in seen["refused"]
        assert seen["version"] == 0


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_are_not_the_models_are_refused_by_name(lab: dict, name: str) -> None:
    for rank in lab["got"]:
        assert f"lacks the weights ['{GONE}']" in rank[name]["lacks"]
        assert f"holds the weights ['{NEW}']" in rank[name]["extra"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing(lab: dict, name: str) -> None:
    """Weights stay bit for bit, and so does what follows."""
    for rank in lab["got"]:
        steps = rank[name]["steps"]
        assert [s.skipped for s in steps] == [False, True, False]
        assert [s.policy_version for s in steps] == [1, 1, 2]
        assert [s.loss_scale for s in steps] == ([2**16, 2**16, 2**15] if "fp16" in name else [None] * 3)
        first, after, last, never = rank[name]["weights"]
        assert [key for key in first if not torch.equal(first[key], after[key])] == []
        assert [key for key in last if not torch.equal(last[key], never[key])] == []
    first, _, last, _ = lab["got"][0][name]["weights"]
    assert any(not torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("name", BROKEN)
def test_a_number_gone_wrong_on_one_rank_raises_on_all(lab: dict, name: str) -> None:
    for rank in lab["got"]:
        seen = rank[name]
        first = lab["got"][1][name]["rollouts"][0]
        assert seen["loss"].startswith(f"FloatingPointError: rank 1: logprobs of rollout {first} "), seen[
            "loss"
        ]
        assert "as many micro-batches" in seen["count"], seen["count"]


@pytest.mark.parametrize("name", ["bf16_zero1", "bf16_zero2", "bf16_zero3", *FP16])
def test_16_bits_with_fp32_masters_and_accumulation_equal_eager(lab: dict, name: str) -> None:
    """The same kernels see the same weights, and everything else is fp32: nothing may drift.

    In fp16 the last bit of a sum over ranks moves weights to the next number eight times as often as in bf16.
    What learning makes of that is bounded here. The first gradient knows nothing of it.
    """
    half = name.split("_")[0]
    for i, want in enumerate(lab[half]["steps"]):
        got = [x for rank in lab["got"] for x in rank[name]["steps"][i]["logprobs"]]
        for a, b in zip(got, want["logprobs"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if half == "bf16" or i == 0 else 1e-2)
        assert lab["got"][0][name]["steps"][i]["grad_norm"] == pytest.approx(
            want["grad_norm"], rel=1e-5 if half == "bf16" or i == 0 else 2e-3
        )
    for key, weight in lab[half]["weights"].items():
        got = lab["got"][0][name]["weights"][key]
        assert got.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
        assert (got.float() - weight.float()).norm() <= {"bf16": 1e-5, "fp16": 2e-4}[
            half
        ] * weight.float().norm(), key


@pytest.mark.parametrize("name", REFERENCED)
def test_a_16_bit_reference_is_the_starting_policy(lab: dict, name: str) -> None:
    """The same kernels on the same weights: no nat between them at first, and some after a step."""
    steps = [results(merge_stats([rank[name]["steps"][i]["stats"] for rank in lab["got"]])) for i in (0, 1)]
    first, second = (step["objective/kl_reference"] for step in steps)
    assert first == 0.0
    assert second > 1e-6


def test_bf16_zero0_accumulates_in_bf16(lab: dict) -> None:
    """DeepSpeed has no fp32 accumulation at stage 0: the first gradient agrees to bf16's rounding."""
    got, want = lab["got"][0]["bf16_zero0"], lab["bf16"]
    assert got["steps"][0]["grad_norm"] == pytest.approx(want["steps"][0]["grad_norm"], rel=4e-3)
    for i in (1, 2):
        assert got["steps"][i]["grad_norm"] == pytest.approx(want["steps"][i]["grad_norm"], rel=0.1)


@pytest.mark.parametrize("name", BF16_EXPERTS)
def test_bf16_expert_parallel_is_near_eager_on_fixed_routes(lab: dict, name: str) -> None:
    """AutoEP keeps gate weights in fp32 and sums experts in another order: only bf16's rounding remains."""
    known = [torch.from_numpy(t.known) for rank in lab["traces"] for t in rank]
    pairs = list(zip(both(lab, name, "logprobs"), lab["fixed"]["outputs"], known, strict=True))
    error = torch.cat([(got - want.logprobs).abs() for got, want, _ in pairs])
    assert error.mean() < 0.02, error.mean()
    assert lab["got"][0][name]["grad_norm"] == pytest.approx(lab["fixed"]["grad_norm"], rel=0.05)
