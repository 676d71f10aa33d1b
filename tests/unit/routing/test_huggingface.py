"""Record and replay on HF routers: the gate formula of each class, the gradient, the packed path."""

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from gspo_dist.learners import attention
from gspo_dist.learners.eager import hf_logprobs
from gspo_dist.learners.hf_model import PolicyModel
from gspo_dist.packing import attach_traces, pack_sequences
from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.replay import RoutingReplayError
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import Completion, Prompt, Rollout
from tests.unit.routing import families
from tests.unit.routing.passes import loss_of, recorded, same_bits, trained

LENGTHS = ((3, 5), (1, 2), (4, 7))  # prompt, completion


def test_recording_is_the_top_k_of_an_independent_softmax(make_model, tokens):
    model = make_model(0)
    inputs = []
    gate = model.model.layers[2].mlp.gate
    handle = gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    trace = recorded(model, tokens)
    handle.remove()
    logits = inputs[0].reshape(-1, 16).double() @ gate.weight.detach().double().T
    want = np.argsort(-logits.numpy(), axis=-1)[:, :2]
    assert trace.expert_ids.shape == (23, 3, 2)
    assert trace.expert_ids.dtype == np.uint8
    assert trace.known.all()
    np.testing.assert_array_equal(trace.expert_ids[:, 1], want)  # router 1 is layer 2: layer 1 is dense


def test_replay_reproduces_the_recorded_networks_choice_exactly(make_model, tokens, clean):
    ours, theirs = make_model(0), make_model(1)
    trace = recorded(theirs, tokens)
    assert (recorded(ours, tokens).expert_ids != trace.expert_ids).any()
    with routers.replay(ours, trace):
        again = recorded(ours, tokens)
    np.testing.assert_array_equal(again.expert_ids, trace.expert_ids)
    clean(ours)


@pytest.mark.parametrize("norm", [True, False])
def test_replaying_the_own_trace_changes_no_bit_of_loss_or_gradient(make_model, tokens, norm):
    model = make_model(0, norm_topk_prob=norm)
    trace = recorded(model, tokens)
    loss, grads = trained(model, tokens)
    replayed_loss, replayed_grads = trained(model, tokens, trace)
    assert torch.equal(loss, replayed_loss)
    assert same_bits(grads, replayed_grads)
    assert any("gate.weight" in name and g.abs().max() > 0 for name, g in replayed_grads.items())


def test_gate_weights_are_the_softmax_restricted_to_the_replayed_set(make_model, tokens, random_trace):
    """R3: g_i = I_i exp(s_i) / sum_j I_j exp(s_j), in float64 and by an expert loop of its own."""
    block = make_model(0).model.layers[0].mlp
    trace = random_trace(5, layers=1)
    torch.manual_seed(9)
    x, up = torch.randn(1, 23, 16), torch.randn(1, 23, 16)
    x.requires_grad_()
    with routers.replay(block, trace):
        y = block(x)
        (y * up).sum().backward()
    gate, gate_up, down = (
        p.detach().double().requires_grad_()
        for p in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    )
    z = x.detach().double().requires_grad_()
    mask = torch.zeros(23, 8, dtype=torch.bool)
    mask[torch.arange(23)[:, None], torch.from_numpy(trace.expert_ids[:, 0].astype(np.int64))] = True
    weights = torch.softmax((z[0] @ gate.T).masked_fill(~mask, -torch.inf), dim=-1)
    want = 0
    for e in range(8):
        g, u = (z[0] @ gate_up[e].T).chunk(2, -1)
        want = want + weights[:, e, None] * ((g * torch.sigmoid(g) * u) @ down[e].T)
    (want * up[0].double()).sum().backward()
    torch.testing.assert_close(y[0].double(), want, rtol=1e-5, atol=1e-6)
    pairs = [
        (x, z),
        (block.gate.weight, gate),
        (block.experts.gate_up_proj, gate_up),
        (block.experts.down_proj, down),
    ]
    for ours, naive in pairs:
        torch.testing.assert_close(ours.grad.double(), naive.grad, rtol=1e-4, atol=1e-5)


def test_the_routers_gradient_under_replay_is_the_slope_of_the_replayed_loss(
    make_model, tokens, random_trace
):
    model = make_model(0, experts_implementation="eager").double()  # grouped_mm has no float64
    trace = random_trace(5)
    _, grads = trained(model, tokens, trace)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "gate.weight" not in name:
            continue
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-3, -1e-3):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                dict(moved.named_parameters())[name].add_(direction, alpha=step)
                with routers.replay(moved, trace):
                    losses.append(float(loss_of(moved, tokens)))
        slope = (losses[0] - losses[1]) / 2e-3
        # the router computes its softmax in float32 whatever the model's type: noise of about 1e-7 / 1e-3
        assert slope == pytest.approx(float((grads[name] * direction).sum()), rel=2e-3, abs=1e-4)


def test_more_than_256_experts_travel_as_uint16(make_model, tokens, random_trace):
    model = make_model(0, num_experts=300, moe_intermediate_size=4, num_experts_per_tok=4)
    own = recorded(model, tokens)
    assert own.expert_ids.dtype == np.uint16
    assert own.expert_ids.max() > 255
    trace = random_trace(5, top_k=4, experts=300)
    with routers.replay(model, trace):
        assert np.array_equal(recorded(model, tokens).expert_ids, trace.expert_ids)


def test_a_dense_model_is_refused(make_model):
    dense = make_model(0, mlp_only_layers=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="routing_replay=none"), routers.record(dense):
        pass


ROUTERS = {
    "Qwen2MoeTopKRouter": "qwen2_moe",
    "Qwen3MoeTopKRouter": "qwen3_moe",
    "Qwen3NextTopKRouter": "qwen3_next",
    "Qwen3_5MoeTopKRouter": "qwen3_5_moe",
    "OlmoeTopKRouter": "olmoe",
    "MixtralTopKRouter": "mixtral",
    "DeepseekV3TopkRouter": "deepseek_v3",
    "Glm4MoeTopkRouter": "glm4_moe",
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_known_gate_is_its_routers_own_formula_bit_for_bit(name, dtype, norm):
    module = importlib.import_module(f"transformers.models.{ROUTERS[name]}.modeling_{ROUTERS[name]}")
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_experts=12,
        num_local_experts=12,
        n_routed_experts=12,
        hidden_size=16,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
        n_group=1,
        topk_group=1,
    )
    torch.manual_seed(1)
    router = getattr(module, name)(config)
    with torch.no_grad():
        router.weight.normal_()
    router = router.to(dtype)
    x = torch.randn(40, 16).to(dtype)
    upstream = torch.randn(40, 3)
    _, weights, ids = router(x)
    (weights * upstream).sum().backward()
    native, router.weight.grad = router.weight.grad, None
    trace = RoutingTrace(ids.numpy()[:, None].astype(np.uint8), np.ones(40, np.bool_), 12)
    with routers.replay(router, trace):
        _, replayed, again = router(x)
        (replayed * upstream).sum().backward()
    assert torch.equal(ids, again)
    assert torch.equal(weights, replayed)
    assert weights.dtype == replayed.dtype
    assert torch.equal(native, router.weight.grad)


@pytest.mark.slow
def test_a_model_compiled_inside_the_block_replays_exactly(make_model, tokens, random_trace):
    torch._dynamo.reset()
    trace = random_trace(5)
    model = make_model(0)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), routers.replay(model, trace), routers.record(model) as recorder:
        got = compiled(tokens, use_cache=False).logits
    np.testing.assert_array_equal(recorder.trace().expert_ids, trace.expert_ids)
    plain = make_model(0)
    with torch.no_grad(), routers.replay(plain, trace):
        torch.testing.assert_close(got, plain(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_compiled_before_the_block_replays_exactly_or_is_refused(make_model, tokens, random_trace):
    """torch runs hooks that are added later only where it has another reason to compile again."""
    torch._dynamo.reset()
    trace = random_trace(5)
    model = make_model(0)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(tokens, use_cache=False)
        with routers.replay(model, trace):
            want = model(tokens, use_cache=False).logits
        try:
            with routers.replay(model, trace):
                got = compiled(tokens, use_cache=False).logits
        except RoutingReplayError as error:
            refusal, got = str(error), want
        else:
            refusal = "a router that a fused or compiled kernel bypasses"
    assert "compiled kernel" in refusal
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def rollouts(random_trace):
    rng = np.random.default_rng(0)

    def make(i, prompt, new):
        completion = Completion(
            rng.integers(0, 61, new),
            np.ones(new, np.bool_),
            np.zeros(new, np.float32),
            np.zeros(new, np.int32),
            "stop",
            "",
            random_trace(i, tokens=prompt + new),
        )
        return Rollout(i, i, Prompt(str(i), tuple(rng.integers(0, 61, prompt).tolist()), ""), completion, 0.0)

    return [make(i, *lengths) for i, lengths in enumerate(LENGTHS)]


@pytest.fixture
def run(make_model):
    model = make_model(0)
    model.set_attn_implementation(attention.NAME)
    policy = PolicyModel(model)

    def run(batch, record=False):
        with torch.no_grad():
            return hf_logprobs(policy, policy.hf, batch, torch.device("cpu"), record)

    return run


def test_packed_sequences_are_replayed_as_each_is_alone(rollouts, run):
    packed = attach_traces(pack_sequences(rollouts, [0.0] * 3, [2, 0, 1]), rollouts)
    alone = [attach_traces(pack_sequences(rollouts, [0.0] * 3, [i]), rollouts) for i in (2, 0, 1)]
    together = run(packed, record=True)
    separate = [run(batch, record=True) for batch in alone]
    np.testing.assert_array_equal(together.routing.expert_ids, packed.routing.expert_ids)
    torch.testing.assert_close(
        together.logprobs, torch.cat([o.logprobs for o in separate]), rtol=1e-5, atol=1e-5
    )
    native = run(packed.with_(routing=None), record=True)
    assert (native.logprobs - together.logprobs).abs().max() > 0.01
    whole = RoutingTrace.concat([run(b.with_(routing=None), record=True).routing for b in alone])
    np.testing.assert_array_equal(native.routing.expert_ids, whole.expert_ids)


def test_a_sequences_routes_touch_no_other_sequence(rollouts, run):
    packed = attach_traces(pack_sequences(rollouts, [0.0] * 3, [0, 1, 2]), rollouts)
    ids = packed.routing.expert_ids.copy()
    first, second = packed.cu_seqlens[1:3].tolist()
    ids[first:second] = (ids[first:second] + 1) % 8
    changed = run(packed.with_(routing=RoutingTrace(ids, packed.routing.known, 8))).logprobs
    before = run(packed).logprobs
    outside = np.r_[0:first, second : packed.num_tokens]
    assert (changed[first:second] - before[first:second]).abs().max() > 1e-3
    torch.testing.assert_close(changed[outside], before[outside], rtol=1e-6, atol=1e-6)


def test_the_last_tokens_missing_routes_do_not_matter(rollouts, run):
    """Nothing is predicted from the last token, so the row that the engine never had changes no log-prob."""
    packed = attach_traces(pack_sequences(rollouts, [0.0] * 3, [0, 1, 2]), rollouts)
    known = packed.routing.known.copy()
    known[packed.cu_seqlens[1:].numpy() - 1] = False
    ids = np.where(known[:, None, None], packed.routing.expert_ids, 0).astype(np.uint8)
    partial = run(packed.with_(routing=RoutingTrace(ids, known, 8)))
    torch.testing.assert_close(partial.logprobs, run(packed).logprobs, rtol=1e-6, atol=1e-6)


def toy_trace(seed, tokens, layers):
    """Distinct random experts, 2 of 8, one row in five unknown."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, 8)).argsort(-1)[..., :2].astype(np.uint8)
    return RoutingTrace(ids, rng.random(tokens) > 0.2, 8)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_familys_routes_are_recorded_and_replayed(family, dtype):
    """Records what its routers return; its own routes change no bit, other routes do and leave a gradient."""
    model = families.make(family).to(dtype)
    torch.manual_seed(2)
    tokens = torch.randint(0, families.VOCABULARY, (1, 13))
    found = routers.find_routers(model)
    chosen = []
    handles = [
        router.register_forward_hook(
            lambda module, _args, output: chosen.append(output[routers.KINDS[type(module).__name__].ids_at])
        )
        for router in found.values()
    ]
    with routers.record(model) as recorder:
        native = logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    own = recorder.trace()
    np.testing.assert_array_equal(own.expert_ids, torch.stack(chosen, 1).numpy())
    with routers.replay(model, own):
        assert torch.equal(logits_of(model, tokens), native)
    other = toy_trace(3, 13, len(found))
    with routers.replay(model, other), routers.record(model) as recorder:
        replayed = logits_of(model, tokens)
    np.testing.assert_array_equal(recorder.trace().expert_ids[other.known], other.expert_ids[other.known])
    assert not torch.equal(replayed, native)
    with routers.replay(model, other):
        model(tokens, use_cache=False).logits.float().square().sum().backward()
    for name, router in found.items():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters()), name


def test_every_class_that_is_served_has_a_family_above():
    served = {
        type(router).__name__
        for family in families.FAMILIES
        for router in routers.find_routers(families.make(family)).values()
    }
    assert served == set(routers.KINDS)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("phimoe", r"PhimoeTopKRouter: it masks and samples"),
        ("llama4_text", r"Llama4Router: it weighs the experts' inputs"),
        ("jamba", r"JambaForCausalLM has none, so it is dense or chooses experts inside its layers"),
        ("qwen3", r"Qwen3ForCausalLM has none, so it is dense"),
    ],
)
def test_families_that_cannot_be_replayed_are_refused_by_name(family, message):
    model = families.make(family)
    with pytest.raises(ValueError, match=message + r".*; set objective\.routing_replay=none"):
        routers.find_routers(model)


def test_one_router_that_is_not_known_refuses_the_model(make_model):
    """Replaying the others alone would be of another network."""

    class StrangeRouter(torch.nn.Linear):
        pass

    model = make_model(0)
    model.model.layers[3].mlp.gate = StrangeRouter(16, 8)
    with pytest.raises(
        ValueError, match=r"model\.layers\.3\.mlp\.gate, a StrangeRouter: this class is not among those"
    ):
        routers.find_routers(model)


def test_every_class_of_the_tables_is_one_of_transformers():
    """A name that transformers drops or respells would silently no longer be served."""
    source = Path(transformers.__file__).parent / "models"
    known = {
        name
        for file in source.glob("*/modeling_*.py")
        for name in re.findall(r"^class (\w+)", file.read_text(), re.M)
    }
    assert sorted((set(routers.KINDS) | set(routers.REFUSED)) - known) == []
