"""Laws of the reference engine: it is a policy, it is repeatable, it takes weights."""

import numpy as np
import pytest
import torch

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.engine import EngineInfo
from gspo_dist.rollout.policy import HFPolicy, places
from gspo_dist.rollout.reference import ReferenceEngine, log_softmax, truncate
from gspo_dist.types import Prompt, SamplingSpec
from gspo_dist.weights.names import hf_named_weights
from gspo_dist.weights.send import send_weights
from gspo_dist.weights.shm import ShmTransport
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.verify import WeightSyncError, verify_receipt
from tests.unit.rollout.table_policy import TablePolicy
from tests.unit.weights.tiny_models import FAMILIES, make

CONFIG = RolloutConfig(precision="fp32", max_prompt_tokens=16, max_completion_tokens=16)
PROMPTS = [Prompt("p0", (3, 4, 5), ""), Prompt("p1", (6, 7), "")]


def tiny_moe(folder, seed=0):
    return make(folder, seed=seed, vocab_size=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    return folder, tiny_moe(folder).eval()


def test_a_completion_does_not_depend_on_its_company():
    spec = SamplingSpec(n=4, max_tokens=10, seed=3, record_routing=True)
    one, other = (ReferenceEngine(CONFIG, TablePolicy(0), record_routing=True) for _ in range(2))
    together = one.generate(PROMPTS, spec, [10, 11])
    alone = other.generate(PROMPTS[1:], spec, [11])
    for a, b in zip(together[1], alone[0], strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.text == b.text
        assert a.logprobs.tolist() == b.logprobs.tolist()
        assert (a.routing.expert_ids == b.routing.expert_ids).all()


def test_samples_requests_and_seeds_differ():
    engine = ReferenceEngine(CONFIG, TablePolicy(0))
    spec = SamplingSpec(n=3, max_tokens=12, seed=1)
    rows = [c.token_ids.tolist() for group in engine.generate(PROMPTS[:1] * 2, spec, [0, 1]) for c in group]
    rows += [c.token_ids.tolist() for c in engine.generate(PROMPTS[:1], SamplingSpec(3, 12, seed=2), [0])[0]]
    assert len({tuple(r) for r in rows}) == 9


def test_logprobs_are_those_of_the_sampling_distribution():
    """Frequency of first tokens against exp(logprob), 20,000 draws; and logprobs_of() says the same."""
    engine = ReferenceEngine(CONFIG, TablePolicy(0, vocab_size=5))
    group = engine.generate(PROMPTS[:1], SamplingSpec(n=20_000, max_tokens=1, seed=0), [0])[0]
    told = {int(c.token_ids[0]): float(np.exp(c.logprobs[0])) for c in group}
    seen = np.bincount([int(c.token_ids[0]) for c in group], minlength=5) / 20_000
    assert sum(told.values()) == pytest.approx(1.0, abs=1e-6)
    for token, p in told.items():
        assert seen[token] == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 20_000))
    scored = engine.logprobs_of([np.array([0, 1, 2, 3, 4])])[0]
    assert np.exp(scored) == pytest.approx([told[t] for t in (1, 2, 3, 4)], rel=1e-5)


def test_completions_end_with_the_stop_token_or_at_the_limit():
    engine = ReferenceEngine(CONFIG, TablePolicy(0, vocab_size=4))
    group = engine.generate(PROMPTS[:1], SamplingSpec(n=200, max_tokens=8, seed=0), [0])[0]
    for c in group:
        stops = [i for i, t in enumerate(c.token_ids) if t == 3]
        assert stops == ([len(c) - 1] if c.finish_reason == "stop" else [])
        assert c.finish_reason == "stop" or len(c) == 8
    assert {c.finish_reason for c in group} == {"stop", "length"}


def test_greedy_takes_the_most_likely_token():
    engine = ReferenceEngine(CONFIG, TablePolicy(1, vocab_size=8))
    [[c]] = engine.generate(PROMPTS[:1], SamplingSpec(n=1, max_tokens=4, temperature=0.0), [0])
    best = int(engine.policy.table.argmax())
    assert set(c.token_ids.tolist()) == {best}


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    p = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    assert np.exp(truncate(p, 0.7)) == pytest.approx(np.array([[0.625, 0.375, 0, 0]]))
    assert np.exp(truncate(p, 0.81)) == pytest.approx(np.array([[0.5, 0.3, 0.15, 0]]) / 0.95)


def test_the_last_token_has_no_route():
    engine = ReferenceEngine(CONFIG, TablePolicy(0), record_routing=True)
    for c in engine.generate(PROMPTS[:1], SamplingSpec(2, 6, seed=0, record_routing=True), [0])[0]:
        assert len(c.routing) == 3 + len(c)
        assert c.routing.known.tolist() == [True] * (2 + len(c)) + [False]
        assert (
            np.sort(c.routing.expert_ids[0], axis=-1)[:, 0] != np.sort(c.routing.expert_ids[0], axis=-1)[:, 1]
        ).all()


def test_hf_policy_samples_its_own_logprobs_and_routes(model):
    folder, hf = model
    engine = ReferenceEngine(CONFIG, HFPolicy(folder), record_routing=True)
    [[c]] = engine.generate(
        PROMPTS[:1], SamplingSpec(1, 8, temperature=1.0, seed=0, record_routing=True), [0]
    )
    row = torch.tensor([3, 4, 5, *c.token_ids.tolist()])
    with torch.no_grad():
        out = hf(row[None], output_router_logits=True)
    table = out.logits[0].log_softmax(-1)[2:-1]
    assert c.logprobs == pytest.approx(table.gather(1, row[3:, None])[:, 0].numpy(), abs=1e-5)
    for layer, logits in enumerate(out.router_logits):
        wanted = logits.topk(2, dim=-1).indices.sort(-1).values.numpy()
        assert (np.sort(c.routing.expert_ids[:-1, layer], axis=-1) == wanted[:-1]).all()


def test_synced_weights_change_the_policy_and_are_receipted(model, tmp_path):
    folder, _ = model
    other = tiny_moe(tmp_path / "other", seed=1).eval()
    engine, transport = ReferenceEngine(CONFIG, HFPolicy(folder)), ShmTransport()
    engine.init_weight_sync(transport.init_info(0))
    sequence = np.array([3, 9, 12, 1, 5])
    before = engine.logprobs_of([sequence])[0]
    engine.start_weight_update()
    with pytest.raises(WeightSyncError, match="middle of a weight update"):
        engine.logprobs_of([sequence])
    report = send_weights(buckets(hf_named_weights(other), 4096), transport, engine.update_weights)
    receipt = engine.finish_weight_update(7)
    verify_receipt(report.checksums, receipt, 7)
    assert (receipt.tensors, receipt.bytes) == (report.tensors, report.bytes)
    with torch.no_grad():
        table = other(torch.from_numpy(sequence)[None]).logits[0].log_softmax(-1)[:-1]
    wanted = table.gather(1, torch.from_numpy(sequence)[1:, None])[:, 0].numpy()
    after = engine.logprobs_of([sequence])[0]
    assert after == pytest.approx(wanted, abs=1e-5)
    assert np.abs(after - before).max() > 0.01
    [[c]] = engine.generate(PROMPTS[:1], SamplingSpec(1, 3, seed=0), [0])
    assert set(c.policy_versions.tolist()) == {7}


def sync(engine, transport, weights, version=1, bucket_bytes=4096):
    engine.start_weight_update()
    report = send_weights(buckets(weights, bucket_bytes), transport, engine.update_weights)
    return report, engine.finish_weight_update(version)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3"])
def test_synced_weights_are_computed_with_whatever_the_folder_calls_them(family, tmp_path):
    make(tmp_path / "start", family)
    other = make(tmp_path / "other", family, seed=1)
    engine = ReferenceEngine(CONFIG, HFPolicy(tmp_path / "start"))
    sync(engine, ShmTransport(), hf_named_weights(other))
    row = torch.arange(2, 12)
    with torch.no_grad():
        table = other(row[None]).logits[0].log_softmax(-1)[:-1]
    wanted = table.gather(1, row[1:, None])[:, 0].numpy()
    assert engine.logprobs_of([row.numpy()])[0] == pytest.approx(wanted, abs=1e-5)


def test_every_element_has_the_place_of_the_docstring(tmp_path):
    hf = make(tmp_path, num_experts=2, hidden_size=3, head_dim=2, moe_intermediate_size=2)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    stored, index = places(hf)[name]
    assert index.tolist() == [[18, 19, 20], [21, 22, 23]]
    assert stored.data_ptr() == hf.model.layers[0].mlp.experts.gate_up_proj.data_ptr()


def test_a_tensor_without_a_place_and_one_that_is_missing_are_named(model, tmp_path):
    folder, hf = model
    transport = ShmTransport(folder=tmp_path)
    engine = ReferenceEngine(CONFIG, HFPolicy(folder), name="engine-1")
    with pytest.raises(WeightSyncError, match=r"engine-1 cannot place nonsense \[1\]"):
        sync(engine, transport, [("nonsense", torch.zeros(1))])
    engine = ReferenceEngine(CONFIG, HFPolicy(folder), name="engine-1")
    kept = [(n, t) for n, t in hf_named_weights(hf) if n != "lm_head.weight"]
    with pytest.raises(WeightSyncError, match=r"engine-1 got no lm_head\.weight \(1 of"):
        sync(engine, transport, kept)
    engine = ReferenceEngine(CONFIG, HFPolicy(folder), name="engine-1")
    engine.start_weight_update()
    staged = transport.stage([("model.norm.weight", torch.ones(32))])
    engine.update_weights(staged.update_info)
    with pytest.raises(WeightSyncError, match=r"engine-1 got model\.norm\.weight twice"):
        engine.update_weights(staged.update_info)
    transport.close()


def test_without_checks_the_receipt_has_counts_and_no_checksums(model, tmp_path):
    folder, hf = model
    transport = ShmTransport(check=False, folder=tmp_path)
    engine = ReferenceEngine(CONFIG, HFPolicy(folder))
    engine.init_weight_sync(transport.init_info(0))
    report, receipt = sync(engine, transport, hf_named_weights(hf), version=4)
    assert (receipt.policy_version, receipt.checksums, receipt.tensors) == (4, {}, report.tensors)
    assert receipt.bytes == sum(p.nbytes for p in hf.parameters())


def test_facts_about_the_engine(model):
    engine = ReferenceEngine(CONFIG, HFPolicy(model[0]), name="engine-3", record_routing=True)
    assert engine.info() == EngineInfo("engine-3", "cpu", 32, 64, 4, 2, 2, True, 1, gives_candidates=True)
    assert engine.policy.eos_ids == {1}
    assert engine.policy.text(np.array([5, 1, 7])) == "t5 t7"


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"sleep_mode": True}])
def test_what_the_reference_engine_cannot_do_is_refused(options):
    with pytest.raises(ValueError, match="runs on a CPU and never sleeps"):
        ReferenceEngine(CONFIG, TablePolicy(0), **options)
    engine = ReferenceEngine(CONFIG, TablePolicy(0))
    with pytest.raises(ValueError, match="cannot sleep"):
        engine.sleep()
    with pytest.raises(ValueError, match="cannot wake up"):
        engine.wake_up()


def test_log_softmax_is_tempered_and_greedy_is_not():
    x = np.array([1.0, 2.0, 4.0])
    assert log_softmax(x, 0.5) == pytest.approx(2 * x - np.log(np.exp(2 * x).sum()), abs=1e-12)
    assert log_softmax(x, 0.0) == pytest.approx(log_softmax(x, 1.0), abs=0)
    assert np.isfinite(log_softmax(np.array([1e4, 0.0]), 1.0)).all()


@pytest.mark.parametrize(
    ("prompt", "spec", "ids", "message"),
    [
        (
            Prompt("long", tuple(range(30)), ""),
            SamplingSpec(1, 8),
            [0],
            "'long'.*30 \\+ 8 tokens for a context of 32",
        ),
        (Prompt("empty", (), ""), SamplingSpec(1, 8), [0], "'empty'"),
        (PROMPTS[0], SamplingSpec(1, 8), [], "one request id per prompt"),
        (PROMPTS[0], SamplingSpec(1, 8, record_routing=True), [0], "not started to record routing"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(prompt, spec, ids, message):
    with pytest.raises(ValueError, match=message):
        ReferenceEngine(CONFIG, TablePolicy(0)).generate([prompt], spec, ids)


def test_buckets_outside_an_update_are_refused():
    engine = ReferenceEngine(CONFIG, TablePolicy(0))
    with pytest.raises(WeightSyncError, match="outside an update"):
        engine.update_weights({})
    with pytest.raises(WeightSyncError, match="no weight update to finish"):
        engine.finish_weight_update(1)
