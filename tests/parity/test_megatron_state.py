"""Checkpoints, routing replay, the reference and expert balance of the megatron learner, on real ranks."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.megatron.stored import stored_weights
from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.models.shape import read_shape
from gspo_dist.planner.host import parked_learner
from gspo_dist.planner.layout import LearnerLayout
from gspo_dist.planner.memory import learner_states
from gspo_dist.routing.trace import RoutingTrace
from tests.parity import megatron_case as case
from tests.parity.ranks import Crew
from tests.parity.test_megatron import Reference, assert_weights, by_batch, eager_reference, launch

EP2 = {"expert_parallel": 2}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return eager_reference(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def run(
    crew: Crew, folder: Path, reference: Reference, world_size: int, layout: dict, actions: list, **job
) -> list[dict]:
    return launch(crew, folder, reference.model, reference.batches, world_size, layout, actions, **job)


def stored_alone(folder: str | Path, reference: Reference) -> dict:
    """The weights that this process, which is no rank of anything, finds in a checkpoint."""
    return dict(stored_weights(Path(folder), read_shape(reference.model)))


def assert_identical(got: dict, want: dict) -> None:
    assert set(got) == set(want)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def check_several(ranks: list[dict], some: list[int]) -> None:
    """Any ranks may export: each has the stream that rank 0 has alone, and the others have none."""
    for i, rank in enumerate(ranks):
        whole, few = rank["several"]
        assert_identical(whole, ranks[0]["weights"][0])
        assert_identical(few, ranks[0]["weights"][0] if i in some else {})


def check_parked(ranks: list[dict], reference: Reference) -> None:
    """What moves is what the planner counts, at toy size and by measured bytes: gradients leave the GPU and
    take no host memory, because they are zero."""
    config = case.make_config(len(ranks), "fp32", **EP2)
    model, layout = read_shape(reference.model), LearnerLayout(config)
    device = {item.name: item.bytes for item in learner_states(model, layout)[0]}
    for rank in ranks:
        states, weights = rank["parked"]
        # Buffers are padded, and norms and the like are some bytes more.
        assert weights == pytest.approx(device["weights"], rel=0.02)
        assert states == pytest.approx(device["gradients"] + device["optimizer"], rel=0.02)
        assert rank["host"] == pytest.approx(sum(i.bytes for i in parked_learner(model, layout)), rel=0.02)


def test_resume_goes_on_and_layouts_change(reference: Reference, tmp_path: Path, crew: Crew) -> None:
    """Saved in the background at step 2 under ep2: resumed under ep2 the third step is the one not
    interrupted, bit for bit; resumed under tp2 it is the eager learner's."""
    saved = str(tmp_path / "checkpoint")
    first = run(
        crew,
        tmp_path / "a",
        reference,
        2,
        EP2,
        [["train", 2], ["save", saved], ["train", 1], "weights", "wait"],
    )
    crew.close()  # what goes on is another process
    # It was moved to host memory and back before the step and after it, as colocated learners are.
    actions = [["load", saved], "nap", ["train", 1], "nap", "weights"]
    again = run(crew, tmp_path / "b", reference, 2, EP2, actions)
    assert [r["version"] for r in again] == [2, 2]
    check_parked(again, reference)
    assert_identical(again[0]["weights"][0], first[0]["weights"][0])
    assert again[0]["steps"][0]["lr"] == first[0]["steps"][2]["lr"]
    assert again[0]["steps"][0]["policy_version"] == 3
    other = run(
        crew,
        tmp_path / "c",
        reference,
        2,
        {"tensor_parallel": 2, "distributed_optimizer": True},
        [["load", saved], ["train", 1], "weights"],
    )
    assert_weights(other[0]["weights"][0], reference.end, 1e-5)


@pytest.mark.parametrize(
    "layout", [{"expert_parallel": 2}, {"distributed_optimizer": False}], ids=["distributed", "plain"]
)
def test_a_resume_with_other_settings_steps_with_them_as_eager_does(
    reference: Reference, tmp_path: Path, crew: Crew, layout: dict
) -> None:
    """tests/unit/learners/test_eager.py holds eager's step to the formula."""
    changed = {
        "lr": 7e-4,
        "betas": (0.6, 0.8),
        "eps": 1e-4,
        "weight_decay": 0.4,
        "grad_clip": 0.02,
        "warmup_steps": 0,
        "schedule": "cosine",
    }
    first = EagerLearner(case.make_config(backend="eager"), reference.model, total_steps=10)
    spec = case.make_spec(reference.data)
    for _ in range(2):
        first.forward_backward(reference.data, spec)
        first.optim_step()
    first.save(tmp_path / "eager")
    settings = replace(first.config, optimizer=replace(first.config.optimizer, **changed))
    eager = EagerLearner(settings, reference.model, total_steps=10)
    eager.load(tmp_path / "eager")
    eager.forward_backward(reference.data, spec)
    step = eager.optim_step()
    assert step.grad_norm > 0.02, "clipping must bite"

    saved = str(tmp_path / "checkpoint")
    run(crew, tmp_path / "a", reference, 2, layout, [["train", 2], ["save", saved], "wait"])
    actions = [["load", saved], ["train", 1], "groups", "weights"]
    ranks = run(crew, tmp_path / "b", reference, 2, layout, actions, optimizer=changed)
    for rank in ranks:
        assert rank["steps"][0]["lr"] == step.lr == pytest.approx(7e-4 * (0.5 + 0.5 * np.cos(np.pi * 0.2)))
        for group in rank["groups"]:
            assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.6, 0.8), 1e-4, 0.4)
    end = {n: t for bucket in eager.weights(1 << 20) for n, t in bucket}
    assert_weights(ranks[0]["weights"][0], end, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_resume_bit_for_bit_and_export_alike(
    reference: Reference, tmp_path: Path, crew: Crew, precision: str
) -> None:
    """Master weights, moments and fp16's loss scale come back whole. Weights loaded under another layout are
    the saved ones, there after a step that overflowed on a scale of 2^60 and changed nothing.
    """
    saved = str(tmp_path / "checkpoint")
    scaled = precision == "fp16"

    def go(name: str, layout: dict, actions: list, scale: int) -> list[dict]:
        job = {"precision": precision, "initial_loss_scale": 2.0**scale}
        return run(crew, tmp_path / name, reference, 2, layout, actions, **job)

    first = go("a", EP2, [["train", 2], "weights", ["save", saved], ["train", 1], "weights", "wait"], 8)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {t.dtype for t in first[0]["weights"][0].values()} == {dtype}
    for step, (_, want) in zip(first[0]["steps"], reference.steps, strict=True):
        assert step["grad_norm"] == pytest.approx(want.grad_norm, rel=0.1 if scaled else 0.25)
    assert_identical(stored_alone(saved, reference), first[0]["weights"][0])
    crew.close()
    again = go("b", EP2, [["load", saved], "nap", "weights", ["train", 1], "nap", "weights"], 14)
    assert_identical(again[0]["weights"][0], first[0]["weights"][0])
    assert_identical(again[0]["weights"][1], first[0]["weights"][1])
    actions = [["train", 1], ["load", saved], "weights", ["several", [1]]]
    other = go("c", {"pipeline_parallel": 2}, actions, 60)
    check_several(other, [1])
    assert_identical(other[0]["weights"][0], first[0]["weights"][0])
    scales = [ranks[0]["steps"][-1]["loss_scale"] for ranks in (first, again, other)]
    assert scales == ([2.0**8, 2.0**8, 2.0**60] if scaled else [None] * 3)
    assert [rank["steps"][0]["policy_version"] for rank in other] == [0 if scaled else 1] * 2


def test_plain_optimizer_saves_synchronously(reference: Reference, tmp_path: Path, crew: Crew) -> None:
    saved = str(tmp_path / "checkpoint")
    layout = {"distributed_optimizer": False, "async_save": False}
    run(crew, tmp_path / "a", reference, 1, layout, [["train", 2], ["save", saved]])
    crew.close()
    again = run(
        crew,
        tmp_path / "b",
        reference,
        2,
        layout | {"pipeline_parallel": 2},
        [["load", saved], ["train", 1], "weights"],
    )
    assert_weights(again[0]["weights"][0], reference.end, 1e-5)


def test_every_rank_writes_its_share_which_any_layout_reads(
    reference: Reference, tmp_path: Path, crew: Crew
) -> None:
    """Two replicas under ep2, then tensor and context ranks: norms have twins there, states other ranges."""
    saved, other = tmp_path / "checkpoint", tmp_path / "other"
    first = run(
        *(crew, tmp_path / "a", reference, 4, EP2),
        [["train", 2], "weights", ["several", [1, 2]], ["save", str(saved)], "wait"],
    )
    check_several(first, [1, 2])
    shares = [sum(p.stat().st_size for p in saved.glob(f"__{rank}_*.distcp")) for rank in range(4)]
    assert max(shares) < 1.2 * min(shares), shares
    twins = {"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 2}
    actions = [["load", str(saved)], "weights", ["several", [3]], ["save", str(other)], "wait"]
    check_several(run(crew, tmp_path / "b", reference, 4, twins, actions), [3])
    again = run(crew, tmp_path / "c", reference, 2, {}, [["load", str(other)], ["train", 1], "weights"])
    assert again[0]["version"] == 2
    assert_weights(again[0]["weights"][0], reference.end, 1e-5)
    for folder in (saved, other):
        destroy_optimizer(folder)
        assert_identical(stored_alone(folder, reference), first[0]["weights"][0])


def destroy_optimizer(folder: Path) -> None:
    """Writes zeros over every piece of the optimiser's states, which are most of the bytes."""
    places = FileSystemReader(str(folder)).read_metadata().storage_data
    zeroed = kept = 0
    for index, place in places.items():
        if index.fqn.startswith("optimizer."):
            with (folder / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(bytes(place.length))
            zeroed += place.length
        else:
            kept += place.length
    assert zeroed > 2 * kept


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing(
    reference: Reference, tmp_path: Path, crew: Crew
) -> None:
    """Weights and what follows are bit for bit those of a run that never saw it."""
    actions = [["train", 1], "skip", ["train", 1], "weights"]
    skipped = run(crew, tmp_path / "a", reference, 2, EP2, actions)
    plain = run(crew, tmp_path / "b", reference, 2, EP2, [["train", 2], "weights"])
    assert [rank["skipped"] for rank in skipped] == [(True, 1), (True, 1)]
    assert [s["policy_version"] for s in skipped[0]["steps"]] == [1, 2]
    assert_identical(skipped[0]["weights"][0], plain[0]["weights"][0])


def test_wrong_checkpoints_are_refused_by_name(reference: Reference, tmp_path: Path, crew: Crew) -> None:
    saved = tmp_path / "checkpoint"
    run(crew, tmp_path / "a", reference, 1, {}, [["train", 1], ["save", str(saved)], "wait"])
    torn, unfinished = tmp_path / "torn", tmp_path / "unfinished"
    shutil.copytree(saved, torn)
    shard = min(torn.glob("*.distcp"))
    shard.unlink()
    shutil.copytree(saved, unfinished)
    (unfinished / "metadata.json").unlink()
    same = run(
        crew, tmp_path / "b", reference, 1, {}, [["load_error", str(torn)], ["load_error", str(unfinished)]]
    )
    assert f"lacks 1 of its 2 shards: {shard.name}" in same[0]["errors"][0]
    assert "is not a finished megatron checkpoint" in same[0]["errors"][1]
    for folder, message in zip((torn, unfinished), same[0]["errors"], strict=True):
        with pytest.raises(ValueError, match=re.escape(message)):
            stored_alone(folder, reference)
    plain = case.make_model("qwen3_moe_plain", tmp_path / "plain")
    other = launch(crew, tmp_path / "c", plain, reference.batches, 1, {}, [["load_error", str(saved)]])
    assert "is of another model: it has no decoder.layers.1.mlp." in other[0]["errors"][0]


def foreign_routes(reference: Reference) -> list[RoutingTrace]:
    """Random distinct experts for each token: routes no model would take. One row in six is unknown."""
    rng = np.random.default_rng(11)
    routes = []
    for batch in reference.data:
        ids = np.argsort(rng.random((batch.num_tokens, 3, 8)), axis=-1)[..., :2].astype(np.uint8)
        routes.append(RoutingTrace(ids, rng.random(batch.num_tokens) > 1 / 6, 8))
    return routes


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, {"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 2, "recompute": "full"}),
        (2, {"pipeline_parallel": 2, "virtual_stages": 2, "recompute": "full"}),
        (2, {"pipeline_parallel": 2}),
    ],
)
def test_routes_are_recorded_and_replayed_under_any_layout(
    world_size: int, layout: dict, reference: Reference, tmp_path: Path, crew: Crew
) -> None:
    """Recorded routes are HF's.

    Under foreign routes, log-probs and gradients are those of the eager learner under the same routes.
    """
    eager = EagerLearner(case.make_config(backend="eager"), reference.model, total_steps=10)
    native = eager.logprobs(reference.data, record_routing=True)
    routes = foreign_routes(reference)
    torch.save(routes, tmp_path / "routes.pt")
    data = [b.with_(routing=r) for b, r in zip(reference.data, routes, strict=True)]
    want = eager.logprobs(data)
    assert max(float((w.logprobs - n.logprobs).abs().max()) for w, n in zip(want, native, strict=True)) > 0.1
    eager.forward_backward(data, case.make_spec(data))
    norm = eager.optim_step().grad_norm
    ranks = run(
        crew,
        tmp_path,
        reference,
        world_size,
        layout,
        [
            "record",
            "logprobs",
            ["foreign_routes", str(tmp_path / "routes.pt")],
            "logprobs",
            ["train", 1],
            "reference",
        ],
        keep_reference=True,
    )
    recorded = by_batch(ranks, "recorded", len(data))
    for expected, outputs in zip(native, recorded, strict=True):
        for got in outputs:
            assert got.routing.known.all()
            assert np.array_equal(np.sort(got.routing.expert_ids), np.sort(expected.routing.expert_ids))
    for i, expectations in enumerate((native, want)):
        for expected, outputs in zip(
            expectations,
            by_batch([{"data_rank": r["data_rank"], "lp": r["logprobs"][i]} for r in ranks], "lp", len(data)),
            strict=True,
        ):
            for got in outputs:
                torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    for rank in ranks:
        assert rank["steps"][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    # The reference is the starting policy, by its own routes, whatever was trained and replayed since.
    for expected, outputs in zip(native, by_batch(ranks, "reference", len(data)), strict=True):
        for got in outputs:
            torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


def merged(ranks: list[dict], step: int) -> dict[str, float]:
    return results(merge_stats([rank["steps"][step]["stats"] for rank in ranks]))


def switch_loss(reference: Reference) -> tuple[float, np.ndarray]:
    """The Switch loss (E * sum_e f_e P_e, weighted by tokens over micro-batches, mean of layers) and the
    loads [L, E], from HF's router logits."""
    hf = AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float32)
    loads, losses = np.zeros((3, 8)), np.zeros(3)
    total = sum(b.num_tokens for b in reference.data)
    for batch in reference.data:
        logits = [[] for _ in range(3)]
        for start, end in pairwise(batch.cu_seqlens):
            with torch.no_grad():
                seen = hf(batch.token_ids[None, start:end], output_router_logits=True).router_logits
            for layer, values in enumerate(v for v in seen if v is not None):
                logits[layer].append(values)
        for layer, values in enumerate(logits):
            probs = torch.cat(values).softmax(-1)
            counts = torch.bincount(probs.topk(2).indices.flatten(), minlength=8).numpy()
            loads[layer] += counts
            fraction = counts / counts.sum()
            losses[layer] += (
                8 * float((torch.from_numpy(fraction) * probs.double().mean(0)).sum()) * batch.num_tokens
            )
    return float(losses.mean() / total), loads


def test_balance_metrics_and_auxiliary_loss(reference: Reference, tmp_path: Path, crew: Crew) -> None:
    """Loads, violations and Switch loss are those of HF's router logits; the gradient ignores the layout."""
    loss, loads = switch_loss(reference)
    knobs = {"aux_loss_coef": 0.5}
    alone = run(crew, tmp_path / "a", reference, 1, knobs, [["train", 1]])
    cut = run(
        crew,
        tmp_path / "b",
        reference,
        4,
        knobs | {"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 2},
        [["train", 1]],
    )
    for ranks in (alone, cut):
        stats = merged(ranks, 0)
        violation = loads.max(1) / loads.mean(1) - 1
        assert stats["routing/max_violation"] == pytest.approx(violation.max(), rel=1e-6)
        assert stats["routing/mean_violation"] == pytest.approx(violation.mean(), rel=1e-6)
        assert stats["routing/dead_experts"] == (loads == 0).sum()
        for moe, layer in enumerate((0, 2, 3)):
            assert stats[f"routing/layer_{layer}/max_violation"] == pytest.approx(violation[moe], rel=1e-6)
            assert stats[f"routing/layer_{layer}/max_load_fraction"] == pytest.approx(
                loads[moe].max() / loads[moe].sum(), rel=1e-6
            )
        assert stats["routing/aux_loss"] == pytest.approx(loss, rel=1e-5)
    assert alone[0]["steps"][0]["grad_norm"] == pytest.approx(cut[0]["steps"][0]["grad_norm"], rel=1e-5)
    without = reference.steps[0][1].grad_norm
    assert abs(alone[0]["steps"][0]["grad_norm"] / without - 1) > 1e-3


def test_expert_bias_moves_towards_the_idle(reference: Reference, tmp_path: Path, crew: Crew) -> None:
    """It is zero at first: log-probs are unchanged. A step moves it by 0.001, up below the mean load."""
    ranks = run(
        crew, tmp_path, reference, 2, {"expert_bias": True, **EP2}, ["logprobs", ["train", 1], "bias"]
    )
    _, loads = switch_loss(reference)
    for i, want in enumerate(reference.logprobs):
        torch.testing.assert_close(
            ranks[i % 2]["logprobs"][0][i // 2].logprobs, want.logprobs, rtol=1e-5, atol=1e-5
        )
    for rank in ranks:
        for moe, (_, (bias, _)) in enumerate(sorted(rank["bias"].items())):
            want = 1e-3 * np.sign(loads[moe].mean() - loads[moe])
            np.testing.assert_allclose(bias.numpy(), want, atol=1e-7)
