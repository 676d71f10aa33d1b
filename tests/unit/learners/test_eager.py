"""Laws of the reference learner: what a step does whatever the packing, what a checkpoint
keeps, what it exports."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_dist.config import LearnerConfig, OptimizerConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.loss import LossSpec
from gspo_dist.metrics.stat import results
from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.objectives.objective import get_objective
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import PackedBatch
from gspo_dist.weights.stacks import unstack

VOCAB = 53
LENGTHS = (9, 6, 13, 7, 10, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path, vocabulary: int = VOCAB) -> Path:
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            initializer_range=0.2,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make(
    model: Path, precision: str = "fp32", keep_reference: bool = False, **optimizer: object
) -> EagerLearner:
    settings = {"lr": 1e-3, "grad_clip": 0.0, "betas": (0.9, 0.95), "eps": 1e-6} | optimizer
    config = LearnerConfig(backend="eager", precision=precision, optimizer=OptimizerConfig(**settings))
    return EagerLearner(config, model, total_steps=6, keep_reference=keep_reference)


def batch(members: tuple[int, ...]) -> PackedBatch:
    """Sequences `members`, each the same wherever it is packed; 3 prompt tokens."""
    ids, engine, advantages = [], [], []
    for s in members:
        g = torch.Generator().manual_seed(100 + s)
        ids.append(torch.randint(0, VOCAB, (LENGTHS[s],), generator=g))
        engine.append(-4.0 + 0.1 * torch.randn(LENGTHS[s], generator=g))
        advantages.append(torch.randn((), generator=g).expand(LENGTHS[s]))
    lengths = torch.tensor([LENGTHS[s] for s in members])
    positions = torch.cat([torch.arange(n) for n in lengths])
    mask = positions >= 3
    return PackedBatch(
        token_ids=torch.cat(ids),
        position_ids=positions,
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        loss_mask=mask,
        advantages=torch.cat(advantages).contiguous(),
        rollout_logprobs=torch.where(mask, torch.cat(engine), 0.0),
        rollout_index=torch.tensor(members) + 40,
    )


def near(learner: EagerLearner, b: PackedBatch) -> PackedBatch:
    """The batch with old log-probs at the policy: every ratio starts at 1, nothing is clipped."""
    return b.with_(old_logprobs=learner.logprobs([b])[0].logprobs)


def spec(name: str = "gspo", kl_coef: float = 0.0) -> LossSpec:
    tokens = sum(LENGTHS) - 3 * len(LENGTHS)
    return LossSpec(get_objective(name, kl_coef=kl_coef), Denominators(len(LENGTHS), tokens, 16))


def gradients(
    learner: EagerLearner, batches: list[PackedBatch], name: str
) -> tuple[list[torch.Tensor], dict]:
    stats = learner.forward_backward([near(learner, b) for b in batches], spec(name))
    grads, learner.gradients = learner.gradients, [None] * len(learner.gradients)
    return [g for g in grads if g is not None], results(stats)


@pytest.mark.parametrize("name", ["gspo", "grpo", "dapo"])
def test_gradient_depends_neither_on_order_nor_on_micro_batches(model: Path, name: str) -> None:
    learner = make(model)
    whole, stats = gradients(learner, [batch((0, 1, 2, 3, 4, 5))], name)
    for parts in ([(5, 3, 1, 0, 2, 4)], [(0, 1), (2,), (3, 4, 5)], [(4,), (1, 5), (0,), (3, 2)]):
        other, other_stats = gradients(learner, [batch(p) for p in parts], name)
        for a, b in zip(whole, other, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9
        assert other_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_first_adamw_step_is_the_closed_form(model: Path) -> None:
    """At step 1 the bias-corrected moments are g and g^2: w <- w (1 - lr wd) - lr g / (|g| + eps)."""
    learner = make(model, weight_decay=0.1)
    before = [m.clone() for m in learner.masters]
    learner.forward_backward([near(learner, batch((0, 1, 2)))], spec())
    grads = [
        torch.zeros_like(m) if g is None else g.clone()
        for m, g in zip(before, learner.gradients, strict=True)
    ]
    step = learner.optim_step()
    assert step.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-6)
    assert (step.lr, step.policy_version) == (1e-3, 1)
    for parameter, w, g in zip(learner.parameters, before, grads, strict=True):
        want = w * (1 - 1e-3 * 0.1) - 1e-3 * g / (g.abs() + 1e-6)
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-6, atol=1e-8)


def test_the_norm_of_a_large_vocabulary_is_that_of_float64(tmp_path: Path) -> None:
    """torch's own float32 norm of 2.5 million numbers is 5e-5 too small on a CPU."""
    learner = make(write_model(tmp_path, vocabulary=80_000))
    g = torch.Generator().manual_seed(0)
    learner.gradients = [torch.randn(m.shape, generator=g) for m in learner.masters]
    wanted = float(torch.stack([gradient.double().norm() for gradient in learner.gradients]).norm())
    assert learner.optim_step().grad_norm == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("ends", ["config.json", "generation_config.json", ""])
def test_a_padding_token_that_ends_turns_is_trained_as_any_other_and_one_that_only_pads_is_not(
    model: Path, tmp_path: Path, ends: str
) -> None:
    """The config names a token that occurs, as chat models name the one that ends a turn."""
    packed = batch((0, 1, 2))
    padding = int(packed.token_ids[4])
    shutil.copytree(model, tmp_path / "padded")
    path = tmp_path / "padded" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": padding, "eos_token_id": 1}))
    if ends:
        named = tmp_path / "padded" / ends
        named.write_text(json.dumps(json.loads(named.read_text()) | {"eos_token_id": [1, padding]}))
    plain, padded = make(model), make(tmp_path / "padded")
    wanted, got = (gradients(learner, [near(learner, packed)], "gspo")[0] for learner in (plain, padded))
    assert float(wanted[0][padding].norm()) > 1e-3
    if not ends:
        wanted[0][padding] = 0.0
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_clipping_scales_the_gradient_and_reports_the_norm_before(model: Path) -> None:
    """With eps far above the gradient, Adam's first step is lr g / eps: linear in the clipped gradient."""
    moved, norms = [], []
    for clip in (0.0, 1e-3):
        learner = make(model, eps=1e3, lr=1e3, grad_clip=clip)
        before = [m.clone() for m in learner.masters]
        learner.forward_backward([near(learner, batch((0, 1, 2)))], spec())
        norms.append(learner.optim_step().grad_norm)
        moved.append(torch.cat([(m - b).flatten() for m, b in zip(learner.masters, before, strict=True)]))
    assert norms[0] == norms[1] > 1e-2
    assert float(moved[1].norm() / moved[0].norm()) == pytest.approx(1e-3 / norms[0], rel=1e-3)


def test_learning_rate_follows_the_worked_example(model: Path) -> None:
    learner = make(model, warmup_steps=2, schedule="linear")
    seen = []
    for _ in range(6):
        learner.forward_backward([near(learner, batch((0, 1)))], spec())
        seen.append(learner.optim_step().lr)
    assert seen == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4], rel=1e-12)


def test_bf16_gradients_accumulate_in_fp32(model: Path) -> None:
    learner = make(model, "bf16")
    batches = [near(learner, batch((s,))) for s in range(6)]
    alone = []
    for b in batches:
        learner.forward_backward([b], spec())
        alone.append(learner.gradients)
        learner.gradients = [None] * len(learner.gradients)
    learner.forward_backward(batches, spec())
    rounded = False
    for i, got in enumerate(learner.gradients):
        parts = [a[i] for a in alone if a[i] is not None]
        want = torch.zeros_like(learner.masters[i])
        for part in parts:
            want += part
        assert got is not None
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        rounded |= not torch.equal(want, want.bfloat16().float())
    assert rounded, "the sums would fit in bf16: the test shows nothing"


def test_fp32_masters_keep_what_bf16_weights_cannot_show(model: Path) -> None:
    """Norm weights are 1.0, where bf16 steps by 1/128 downwards: 1e-4 a step must not be lost."""
    learner = make(model, "bf16", lr=1e-4)
    i = next(i for i, (n, _) in enumerate(learner.policy.named_parameters()) if n == "hf.model.norm.weight")
    for _ in range(4):
        learner.forward_backward([near(learner, batch((0, 1, 2, 3, 4, 5)))], spec())
        learner.optim_step()
    moved = (learner.masters[i] - 1.0).abs()
    assert moved.max() > 2e-4
    assert torch.equal(learner.parameters[i], torch.ones_like(learner.parameters[i]))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resuming_equals_not_stopping_bit_for_bit(model: Path, tmp_path: Path, precision: str) -> None:
    first = make(model, precision, warmup_steps=3, grad_clip=0.1)
    data = [near(first, batch((0, 1, 2))), near(first, batch((3, 4, 5)))]
    for _ in range(2):
        first.forward_backward(data, spec())
        first.optim_step()
    torch.manual_seed(9)
    first.save(tmp_path)
    noise = torch.rand(2)
    first.forward_backward(data, spec())
    on = first.optim_step()
    second = make(model, precision, warmup_steps=3, grad_clip=0.1)
    second.load(tmp_path)
    assert second.policy_version == 2
    assert torch.equal(torch.rand(2), noise)
    second.forward_backward(data, spec())
    assert second.optim_step() == on
    for field in ("masters", "parameters"):
        for a, b in zip(getattr(first, field), getattr(second, field), strict=True):
            assert torch.equal(a, b)


def test_a_resume_with_other_settings_steps_with_them_from_the_saved_moments(
    model: Path, tmp_path: Path
) -> None:
    """AdamW by hand: m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2, then the step at the new
    lr, eps and weight decay. Step 2 is the first after a warm-up of 2, so its factor is 1."""
    first = make(model)
    data = [near(first, batch((0, 1, 2)))]
    for _ in range(2):
        first.forward_backward(data, spec())
        first.optim_step()
    first.save(tmp_path)
    moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in first.optimizer.state.values()]
    changed = {"lr": 4e-3, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.2}
    second = make(model, **changed, warmup_steps=2, schedule="linear")
    second.load(tmp_path)
    before = [m.clone() for m in second.masters]
    second.forward_backward(data, spec())
    grads = [torch.zeros_like(m) if g is None else g for m, g in zip(before, second.gradients, strict=True)]
    assert second.optim_step().lr == 4e-3
    for parameter, w, g, (m, v) in zip(second.parameters, before, grads, moments, strict=True):
        mean, square = (0.5 * m + 0.5 * g) / (1 - 0.5**3), (0.75 * v + 0.25 * g * g) / (1 - 0.75**3)
        want = w * (1 - 4e-3 * 0.2) - 4e-3 * mean / (square.sqrt() + 1e-3)
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-5, atol=1e-7)


def test_a_longer_run_follows_its_own_schedule_from_the_first_step(model: Path, tmp_path: Path) -> None:
    """A linear schedule to 6 steps is at 4/6 after two steps. Stretched to 12 it is at 10/12."""
    first = make(model, schedule="linear")
    data = [near(first, batch((0, 1, 2)))]
    for _ in range(2):
        first.forward_backward(data, spec())
        first.optim_step()
    first.save(tmp_path)
    longer = EagerLearner(first.config, model, total_steps=12)
    longer.load(tmp_path)
    longer.forward_backward(data, spec())
    assert longer.optim_step().lr == pytest.approx(1e-3 * 10 / 12, rel=1e-9)


def test_a_state_of_another_precision_or_a_torn_one_is_refused(model: Path, tmp_path: Path) -> None:
    make(model, "bf16").save(tmp_path)
    learner = make(model, "fp32")
    with pytest.raises(ValueError, match=r"learner\.precision was bf16 and is fp32"):
        learner.load(tmp_path)
    file = tmp_path / "eager.pt"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"eager\.pt is torn"):
        make(model, "bf16").load(tmp_path)
    assert learner.policy_version == 0


def test_a_full_disk_names_the_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "eager.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"no room for the learner's state.*eager\.pt"):
        make(model).save(tmp_path)


def test_a_log_prob_that_is_not_a_number_names_the_rollout(model: Path) -> None:
    learner = make(model)
    good = batch((0, 1, 2))
    # An embedding gone wrong reaches every sequence that holds the token, and no other.
    token = int(good.token_ids[good.cu_seqlens[1]])
    assert token not in good.token_ids[: good.cu_seqlens[1]]
    with torch.no_grad():
        learner.policy.hf.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(FloatingPointError, match=r"logprobs of rollout 41 are not finite"):
        learner.forward_backward([good], spec())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(model: Path, tmp_path: Path, bad: float) -> None:
    """Weights and optimiser stay as they were, and what follows is as if the step had not been asked for."""
    learner, other = make(model), make(model)
    packed = near(learner, batch((0, 1)))
    for one in (learner, other):
        one.forward_backward([packed], spec())
        one.optim_step()
    learner.forward_backward([packed], spec())
    learner.gradients[0][0] = bad
    step = learner.optim_step()
    assert (step.skipped, step.policy_version) == (True, 1)
    assert not math.isfinite(step.grad_norm)
    for one, name in ((learner, "a"), (other, "b")):
        one.forward_backward([packed], spec())
        assert (one.optim_step().skipped, one.policy_version) == (False, 2)
        one.save(tmp_path / name)
    states = [torch.load(tmp_path / name / "eager.pt") for name in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*(s["masters"] for s in states), strict=True))
    for a, b in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 1 << 30])
def test_export_is_the_saved_model(model: Path, bucket_bytes: int) -> None:
    """Names and values of the folder that HF wrote: experts one by one, nothing
    twice, buckets within bounds."""
    want = load_file(model / "model.safetensors")
    got: dict[str, torch.Tensor] = {}
    for bucket in make(model).weights(bucket_bytes):
        assert len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= bucket_bytes
        for name, tensor in bucket:
            assert name not in got
            got[name] = tensor
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    stacked = [item for bucket in make(model).weights(bucket_bytes, stacked=True) for item in bucket]
    again = dict(unstack(stacked))
    assert again.keys() == want.keys()
    assert all(torch.equal(again[name], want[name]) for name in want)
    assert len(stacked) < len(want)


def test_the_reference_stays_where_the_policy_started(model: Path) -> None:
    learner = make(model, keep_reference=True)
    data = [near(learner, batch((0, 1, 2)))]
    start = learner.logprobs(data)[0].logprobs
    learner.forward_backward([b.with_(ref_logprobs=start) for b in data], spec(kl_coef=0.1))
    learner.optim_step()
    assert torch.equal(learner.logprobs(data, reference=True)[0].logprobs, start)
    traced = learner.logprobs([b.with_(routing=None) for b in data], record_routing=True)[0].routing
    odd = RoutingTrace(traced.expert_ids[::-1].copy(), traced.known, traced.num_experts)
    given = [data[0].with_(routing=odd)]
    assert not torch.equal(learner.logprobs(given)[0].logprobs, learner.logprobs(data)[0].logprobs)
    assert torch.equal(learner.logprobs(given, reference=True)[0].logprobs, start)  # it routes by itself
    assert not torch.equal(learner.logprobs(data)[0].logprobs, start)


def test_without_a_reference_its_log_probs_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="kl_coef above 0"):
        make(model).logprobs([batch((0,))], reference=True)
