import copy
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.replay import RoutingReplayError
from gspo_dist.routing.trace import RoutingTrace


def recorded(model, tokens, **kwargs):
    with torch.no_grad(), routers.record(model, **kwargs) as recorder:
        model(tokens, use_cache=False)
    return recorder.trace()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, tokens):
    logits = model(tokens, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], tokens[0, 1:])


def trained(model, tokens, trace=None):
    model.zero_grad()
    if trace is None:
        loss = loss_of(model, tokens)
        loss.backward()
    else:
        with routers.replay(model, trace):
            loss = loss_of(model, tokens)
            loss.backward()
    return loss.detach(), gradients(model)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_order_of_record_and_replay_does_not_matter_and_native_shows_the_routers_own_choice(
    make_model, tokens, clean
):
    ours = make_model(0)
    trace = recorded(make_model(1), tokens)
    with (
        torch.no_grad(),
        routers.record(ours) as outer,
        routers.record(ours, native=True) as native,
        routers.replay(ours, trace),
        routers.record(ours) as inner,
    ):
        ours(tokens, use_cache=False)
    np.testing.assert_array_equal(outer.trace().expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(inner.trace().expert_ids, trace.expert_ids)
    # nothing upstream of the first router is replayed: its own choice is that of a plain forward
    np.testing.assert_array_equal(native.trace().expert_ids[:, 0], recorded(ours, tokens).expert_ids[:, 0])
    assert (native.trace().expert_ids != trace.expert_ids).any()
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_replayed_in_the_recomputation_too(
    make_model, tokens, random_trace, reentrant, clean
):
    model = make_model(0)
    trace = random_trace(5)
    loss, grads = trained(model, tokens, trace)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.zero_grad()
    with routers.replay(model, trace) as feeder, routers.record(model) as recorder:
        again = loss_of(model, tokens)
        again.backward()
    assert torch.equal(loss, again)
    assert same_bits(grads, gradients(model))
    assert [(layer.forwards, layer.recomputes) for layer in feeder.layers] == [(1, 1)] * 3
    np.testing.assert_array_equal(
        recorder.trace().expert_ids, trace.expert_ids
    )  # recomputations are not recorded


def test_a_checkpointed_backward_left_outside_the_block_is_refused(make_model, tokens, random_trace, clean):
    model = make_model(0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with (
        pytest.raises(
            RoutingReplayError, match=r"layers\.0\.mlp\.gate used 1 of 1 .* 0 of 1 .*2 more routers"
        ),
        routers.replay(model, random_trace(5)),
    ):
        loss_of(model, tokens)
    clean(model)
    with torch.no_grad(), routers.replay(model, random_trace(5)):
        loss_of(model, tokens)  # nothing will be recomputed: one use is the law


def test_leaving_without_a_forward_and_running_two_are_refused(make_model, tokens, random_trace, clean):
    model = make_model(0)
    with (
        pytest.raises(RoutingReplayError, match=r"model\.layers\.0\.mlp\.gate used 0 of 1 routes"),
        routers.replay(model, random_trace(5)),
    ):
        pass
    with (
        pytest.raises(RoutingReplayError, match=r"model\.layers\.0\.mlp\.gate asked for route 2 of 1"),
        routers.replay(model, random_trace(5)),
    ):
        model(tokens, use_cache=False)
        model(tokens, use_cache=False)
    clean(model)


def test_a_forward_that_skips_a_router_is_refused(make_model, tokens, random_trace, clean):
    model = make_model(0)
    layers = model.model.layers
    with (
        pytest.raises(RoutingReplayError, match=r"model\.layers\.3\.mlp\.gate used 0 of 1"),
        routers.replay(model, random_trace(5)),
    ):
        layers[3].mlp.gate.forward, kept = lambda x: None, layers[3].mlp
        layers[3].mlp = torch.nn.Identity()
        try:
            model(tokens, use_cache=False)
        finally:
            layers[3].mlp = kept
            del kept.gate.forward
    clean(model)
    with pytest.raises(RoutingReplayError, match="saw 0"), routers.record(model) as recorder:
        layers[0].mlp(torch.randn(1, 4, 16))
        recorder.trace()


def test_an_exception_inside_passes_through_and_leaves_the_model_clean(
    make_model, tokens, random_trace, clean
):
    model = make_model(0)
    loss, grads = trained(model, tokens)
    with pytest.raises(ZeroDivisionError), routers.replay(model, random_trace(5)), routers.record(model):
        model(tokens, use_cache=False)
        raise ZeroDivisionError
    clean(model)
    again, regrads = trained(model, tokens)
    assert torch.equal(loss, again)
    assert same_bits(grads, regrads)


def test_a_second_replay_is_refused_and_does_not_disturb_the_first(make_model, tokens, random_trace, clean):
    model = make_model(0)
    trace = random_trace(5)
    with torch.no_grad(), routers.replay(model, trace):
        with (
            pytest.raises(RoutingReplayError, match="being replayed already"),
            routers.replay(model, random_trace(6)),
        ):
            pass
        assert np.array_equal(recorded(model, tokens).expert_ids, trace.expert_ids)
    clean(model)


def test_unknown_rows_are_routed_natively_and_counted(make_model, tokens, random_trace):
    model = make_model(0)
    trace = random_trace(5)
    known = trace.known.copy()
    known[[4, 9, 22]] = False
    ids = trace.expert_ids.copy()
    ids[~known] = 0  # what a trace holds there is no route (both ids equal) and must not be looked at
    partial = RoutingTrace(ids, known, 8)
    with (
        torch.no_grad(),
        routers.record(model, native=True) as native,
        routers.record(model) as used,
        routers.replay(model, partial) as feeder,
    ):
        model(tokens, use_cache=False)
    np.testing.assert_array_equal(used.trace().expert_ids[known], trace.expert_ids[known])
    np.testing.assert_array_equal(used.trace().expert_ids[~known], native.trace().expert_ids[~known])
    np.testing.assert_array_equal(
        used.trace().expert_ids[~known, 0], recorded(model, tokens).expert_ids[~known, 0]
    )
    assert (feeder.rows, feeder.native_rows) == (23, 3)


def test_a_wholly_unknown_trace_is_plain_routing_bit_for_bit(make_model, tokens, random_trace):
    model = make_model(0)
    nothing = RoutingTrace(np.zeros((23, 3, 2), np.uint8), np.zeros(23, np.bool_), 8)
    loss, grads = trained(model, tokens)
    replayed_loss, replayed_grads = trained(model, tokens, nothing)
    assert torch.equal(loss, replayed_loss)
    assert same_bits(grads, replayed_grads)


def test_more_than_256_experts_travel_as_uint16(make_model, tokens, random_trace):
    model = make_model(0, num_experts=300, moe_intermediate_size=4, num_experts_per_tok=4)
    own = recorded(model, tokens)
    assert own.expert_ids.dtype == np.uint16
    assert own.expert_ids.max() > 255
    trace = random_trace(5, top_k=4, experts=300)
    with routers.replay(model, trace):
        assert np.array_equal(recorded(model, tokens).expert_ids, trace.expert_ids)


def test_traces_that_do_not_fit_are_refused_before_the_model_runs(make_model, random_trace, clean):
    model = make_model(0)
    for wrong in (random_trace(0, layers=4), random_trace(0, top_k=3), random_trace(0, experts=16)):
        with pytest.raises(ValueError, match="recorded from another model"), routers.replay(model, wrong):
            pass
    with (
        pytest.raises(ValueError, match=r"22 rows for 23 tokens .*layers\.0\.mlp\.gate, token 22"),
        routers.replay(model, random_trace(0)[:22], tokens=23),
    ):
        pass
    clean(model)


def test_a_truncated_trace_is_refused_at_the_first_router(make_model, tokens, random_trace, clean):
    model = make_model(0)
    with (
        pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.gate must have one row a token: got 20 rows for 23"
        ),
        routers.replay(model, random_trace(0, tokens=20)),
    ):
        model(tokens, use_cache=False)
    clean(model)


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
@pytest.mark.parametrize("name", sorted(routers.GATES))
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


def test_compiled_models_replay_exactly_or_say_that_they_cannot(make_model, tokens, random_trace):
    torch._dynamo.reset()
    trace = random_trace(5)
    fresh = make_model(0)
    compiled = torch.compile(fresh, backend="eager")
    with torch.no_grad(), routers.replay(fresh, trace), routers.record(fresh) as recorder:
        want = compiled(tokens, use_cache=False).logits
    np.testing.assert_array_equal(recorder.trace().expert_ids, trace.expert_ids)
    plain = make_model(0)
    with torch.no_grad(), routers.replay(plain, trace):
        torch.testing.assert_close(want, plain(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-6)
    warm = torch.compile(plain, backend="eager")
    with torch.no_grad():
        native = warm(tokens, use_cache=False).logits
        try:
            with routers.replay(plain, trace):
                late = warm(tokens, use_cache=False).logits
        except RoutingReplayError as error:  # without a reason to recompile, hooks added later are not run
            assert "compiled kernel" in str(error)
        else:
            torch.testing.assert_close(late, want, rtol=1e-5, atol=1e-6)
            assert not torch.equal(late, native)
