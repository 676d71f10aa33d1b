"""The megatron learner equals the eager one however the model is cut: real processes, gloo, fp32."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo_dist.learners.coordinates import coordinates
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.megatron.stored import stored_weights
from gspo_dist.metrics.stat import merge_stats, results
from gspo_dist.models.shape import read_shape
from tests.parity import megatron_case as case
from tests.parity.ranks import Crew
from tests.parity.reads import by_expert, with_candidates, with_other_routers

LAYOUTS = {
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"distributed_optimizer": False}),
    "tp2": (2, {"tensor_parallel": 2}),
    "ep2": (2, {"expert_parallel": 2}),
    "pp2": (
        2,
        {"pipeline_parallel": 2, "transformer": {"num_layers_in_first_pipeline_stage": 3}},
    ),
    "vpp2": (2, {"pipeline_parallel": 2, "virtual_stages": 2, "recompute": "full"}),
    "cp2": (2, {"context_parallel": 2}),
    "tp2_ep2": (
        2,
        {
            "tensor_parallel": 2,
            "expert_parallel": 2,
            "recompute": "selective",
            "transformer": {"recompute_modules": ["moe"]},
            "ddp": {"bucket_size": 4000},
        },
    ),
    "etp2": (2, {"tensor_parallel": 2, "expert_tensor_parallel": 2}),
    "ep2_pp2": (4, {"expert_parallel": 2, "pipeline_parallel": 2, "distributed_optimizer": False}),
    "tp2_cp2_ep2": (4, {"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 2}),
}


def launch(
    crew: Crew, folder: Path, model: Path, batches: Path, world_size: int, layout: dict, actions: list, **job
) -> list[dict]:
    """Runs one learner a rank and returns what each saw; a failed rank's output is the test's message."""
    job |= {"model": str(model), "batches": str(batches), "layout": layout, "actions": actions}
    return crew.run(folder, job, world_size)


@dataclass
class Reference:
    """The eager learner on the same model and data, before and after three steps."""

    model: Path
    batches: Path
    data: list
    logprobs: list
    steps: list
    start: dict
    end: dict
    reads: Reads


@dataclass
class Reads:
    """The steps after those, under objectives that read more than log-probs: `reading` of the same model."""

    scores: list
    steps: list
    end: dict


def reading(kind: str) -> list:
    """What a rank does after its other steps. Router scores where there are routers, then other tokens."""
    centred = ["candidates", ["objective", "score_centering"], ["train", 1], "weights"]
    moe = "num_experts_per_tok" in case.MAKERS[kind][2]
    return ["scores", ["objective", "rspo"], ["train", 2], *centred] if moe else centred


def eager_reads(learner: EagerLearner, data: list, kind: str) -> Reads:
    """What `reading` does, by the eager learner."""
    out = Reads([], [], {})
    for action in reading(kind):
        name, argument = action if isinstance(action, list) else (action, None)
        if name == "scores":
            routers = [o.router for o in learner.logprobs(data, record_scores=True)]
            out.scores = [by_expert(r) for r in routers]
            data = [with_other_routers(b, r) for b, r in zip(data, routers, strict=True)]
        elif name == "candidates":
            data = [with_candidates(b, case.VOCAB) for b in data]
        elif name == "objective":
            spec = case.make_spec(data, argument)
        elif name == "train":
            for _ in range(argument):
                stats = results(learner.forward_backward(data, spec))
                out.steps.append((stats, learner.optim_step()))
    out.end = {n: t.clone() for bucket in learner.weights(1 << 20) for n, t in bucket}
    assert all(0.6 < s["objective/router_shift"] < 0.9 for s, _ in out.steps[:-1])
    assert 0.0 < out.steps[-1][0]["objective/candidates_rest"] < 0.5
    return out


def assert_reads(ranks: list[dict], reference: Reference) -> None:
    """Router scores, statistics, gradient norms and weights of `reading` equal the eager learner's."""
    if reference.reads.scores:
        dealt = by_batch(ranks, "scores", len(reference.data))
        for want, outputs in zip(reference.reads.scores, dealt, strict=True):
            for got in outputs:
                torch.testing.assert_close(by_expert(got.router), want, rtol=1e-5, atol=1e-5)
    assert_training(
        [r | {"steps": r["steps"][case.STEPS :]} for r in ranks], reference.reads.steps, case.STEPS
    )
    assert_weights(ranks[0]["weights"][-1], reference.reads.end, 1e-5, reference.end)


def eager_reference(folder: Path, kind: str) -> Reference:
    model = case.make_model(kind, folder / "model")
    learner = EagerLearner(case.make_config(backend="eager"), model, total_steps=10)
    data = case.make_batches()
    data = case.near(data, [o.logprobs for o in learner.logprobs(data)])
    torch.save(data, folder / "batches.pt")
    outputs = learner.logprobs(data)
    start = {n: t.clone() for bucket in learner.weights(1 << 20) for n, t in bucket}
    seen = []
    for _ in range(case.STEPS):
        stats = results(learner.forward_backward(data, case.make_spec(data)))
        seen.append((stats, learner.optim_step()))
    end = {n: t.clone() for bucket in learner.weights(1 << 20) for n, t in bucket}
    for stats, step in seen:  # every step must have something to compare
        assert step.grad_norm > 0.1
        assert 0.0 < stats["objective/sequence_clip_fraction"] < 1.0
    reads = eager_reads(learner, data, kind)
    return Reference(model, folder / "batches.pt", data, outputs, seen, start, end, reads)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return eager_reference(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def stored(model: Path) -> dict[str, torch.Tensor]:
    """What the model's files hold."""
    files = sorted(model.glob("*.safetensors"))
    assert len(files) > 1
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def by_batch(ranks: list[dict], key: str, count: int) -> list:
    """Every rank's list under `key` dealt back to the micro-batches: [count][ranks of the replica]."""
    replicas = 1 + max(r["data_rank"] for r in ranks)
    out: list[list] = [[] for _ in range(count)]
    for rank in ranks:
        for i, value in enumerate(rank[key]):
            out[i * replicas + rank["data_rank"]].append(value)
    return out


def assert_logits(ranks: list[dict], reference: Reference, tensor: int) -> float:
    """Token by token equal to HF's, put together from the context ranks' rows and the tensor ranks' columns;
    returns the largest difference."""
    worst = 0.0
    hf = AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float32)
    for batch, parts in zip(reference.data, by_batch(ranks, "logits", len(reference.data)), strict=True):
        got = torch.full((batch.num_tokens, case.VOCAB), torch.nan)
        width = case.VOCAB // tensor
        for i, (source, logits) in enumerate(parts):
            real = source >= 0
            columns = slice((i % tensor) * width, (i % tensor + 1) * width)
            got[source[real], columns] = logits[real]
        for start, end in pairwise(batch.cu_seqlens):
            with torch.no_grad():
                want = hf(batch.token_ids[None, start:end]).logits[0]
            torch.testing.assert_close(got[start:end], want, rtol=0, atol=1e-4)
            worst = max(worst, float((got[start:end] - want).abs().max()))
    return worst


def assert_training(ranks: list[dict], steps: list, before: int = 0) -> dict[str, float]:
    """Statistics, gradient norms and schedule of every step; returns the largest differences.

    before: steps that were made earlier.
    """
    worst = {"loss": 0.0, "grad_norm": 0.0}
    for i, (want, step) in enumerate(steps):
        got = results(merge_stats([rank["steps"][i]["stats"] for rank in ranks]))
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-5, abs=2e-6), (i, name)
        for rank in ranks:
            assert rank["steps"][i]["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-5)
            assert rank["steps"][i]["lr"] == step.lr
            assert rank["steps"][i]["policy_version"] == before + i + 1
            difference = abs(rank["steps"][i]["grad_norm"] / step.grad_norm - 1.0)
            worst["grad_norm"] = max(worst["grad_norm"], difference)
        worst["loss"] = max(worst["loss"], abs(got["objective/loss"] - want["objective/loss"]))
    return worst


def assert_weights(got: dict, want: dict, tolerance: float, start: dict | None = None) -> float:
    """Every tensor within `tolerance` of its norm and, where `start` is given, within 1e-2 of how far it
    moved; returns the largest relative difference."""
    assert set(got) == set(want)
    worst = 0.0
    for name, tensor in want.items():
        error = float(torch.linalg.vector_norm(got[name].float() - tensor) / torch.linalg.vector_norm(tensor))
        assert error <= tolerance, (name, error)
        if start is not None:
            moved = torch.linalg.vector_norm(tensor - start[name])
            assert torch.linalg.vector_norm(got[name].float() - tensor) <= 1e-2 * moved, name
        worst = max(worst, error)
    return worst


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_eager(name: str, reference: Reference, tmp_path: Path, crew: Crew, measured) -> None:
    """Logits, log-probs, three clipped steps and exported weights do not depend on how the model is cut."""
    world_size, layout = LAYOUTS[name]
    ranks = launch(
        crew,
        tmp_path,
        reference.model,
        reference.batches,
        world_size,
        layout,
        ["weights", "logits", "logprobs", "train", "weights", *reading("qwen3_moe")],
    )
    logits, logprobs = assert_logits(ranks, reference, layout.get("tensor_parallel", 1)), 0.0
    for want, outputs in zip(
        reference.logprobs,
        by_batch([r | {"lp": r["logprobs"][0]} for r in ranks], "lp", len(reference.data)),
        strict=True,
    ):
        for got in outputs:
            torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
            logprobs = max(logprobs, float((got.logprobs - want.logprobs).abs().max()))
    training = assert_training(ranks, reference.steps)
    assert [r["exporter"] for r in ranks] == [True] + [False] * (world_size - 1)
    assert all(not stream for r in ranks[1:] for stream in r["weights"])
    before, after, _ = ranks[0]["weights"]
    assert_weights(before, stored(reference.model), 0.0)
    weights = assert_weights(after, reference.end, 1e-5, reference.start)
    measured("megatron", name, logits=logits, logprobs=logprobs, weights=weights, **training)
    assert_reads(ranks, reference)
    for number, rank in enumerate(ranks):
        own = coordinates(case.make_config(world_size, **layout), number)
        assert own == {key: rank["at"][key] for key in own}
        assert {key for key, at in rank["at"].items() if at} <= own.keys()
        # Two steps of rspo: a pipeline measures the shift in one pass of all micro-batches, and copies of it
        # where virtual stages need one for each stage.
        stages = layout.get("pipeline_parallel", 1)
        one = stages if "virtual_stages" in layout else 1
        shifts = [p for p, after in pairwise(rank["passes"]) if p[0] and not after[0]]
        assert shifts.count((True, one)) == (2 if stages > 1 else 0), rank["passes"]


def test_the_deterministic_mode_gives_the_same_bits_again(
    reference: Reference, tmp_path: Path, crew: Crew
) -> None:
    """megatron-core takes other operations in it, whose results are the eager learner's too."""
    world_size, layout = LAYOUTS["tp2_ep2"]
    seen = []
    for name in ("first", "second"):
        common = (reference.model, reference.batches, world_size, layout, ["train", "weights"])
        ranks = launch(crew, tmp_path / name, *common, deterministic=True)
        assert all(rank["mode"] == (True, True) for rank in ranks)
        assert_training(ranks, reference.steps)
        assert_weights(ranks[0]["weights"][0], reference.end, 1e-5, reference.start)
        seen.append(ranks)
    for first, second in zip(*seen, strict=True):
        assert [s["grad_norm"] for s in first["steps"]] == [s["grad_norm"] for s in second["steps"]]
        assert all(torch.equal(t, second["weights"][0][n]) for n, t in first["weights"][0].items())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3", "pp2"),
        ("qwen3", "tp2_no_sequence_parallel"),
        ("qwen2", "tp2"),
        ("llama", "cp2"),
        ("qwen3_moe_plain", "ep2"),
        ("mixtral", "tp2_ep2"),
        ("qwen2_moe", "tp2_ep2"),
    ],
)
def test_other_architectures_equal_eager(kind: str, name: str, tmp_path: Path, crew: Crew, measured) -> None:
    """Tied embeddings over two stages, biases, shared experts, other names in the files: the same laws."""
    reference = eager_reference(tmp_path / "eager", kind)
    world_size, layout = LAYOUTS.get(name) or (2, {"tensor_parallel": 2, "sequence_parallel": False})
    ranks = launch(
        crew,
        tmp_path,
        reference.model,
        reference.batches,
        world_size,
        layout,
        ["weights", "logits", "train", "weights", ["save", str(tmp_path / "saved")], "wait", *reading(kind)],
    )
    logits = assert_logits(ranks, reference, layout.get("tensor_parallel", 1))
    training = assert_training(ranks, reference.steps)
    before, after, _ = ranks[0]["weights"]
    assert_weights(before, stored(reference.model), 0.0)
    weights = assert_weights(after, reference.end, 1e-5, reference.start)
    measured("megatron", f"{kind}: {name}", logits=logits, weights=weights, **training)
    assert_reads(ranks, reference)
    alone = dict(stored_weights(tmp_path / "saved", read_shape(reference.model)))
    assert_weights(alone, after, 0.0)  # read from the checkpoint by this process
