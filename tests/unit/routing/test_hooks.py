"""The laws of record and replay through forward hooks, shown on a tiny HF model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.hooks import RouterHooks
from gspo_dist.routing.replay import RoutingReplayError
from gspo_dist.routing.trace import RoutingTrace
from tests.unit.routing.passes import gradients, loss_of, recorded, run_under, same_bits, trained


def test_the_order_of_record_and_replay_does_not_matter(make_model, tokens, clean):
    ours = make_model(0)
    trace = recorded(make_model(1), tokens)
    with (
        torch.no_grad(),
        routers.record(ours) as outer,
        routers.replay(ours, trace),
        routers.record(ours) as inner,
    ):
        ours(tokens, use_cache=False)
    np.testing.assert_array_equal(outer.trace().expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(inner.trace().expert_ids, trace.expert_ids)
    assert (recorded(ours, tokens).expert_ids != trace.expert_ids).any()
    clean(ours)


def test_leaving_one_block_leaves_the_others_at_work(make_model, tokens, random_trace, clean):
    model = make_model(0)
    trace = random_trace(5)
    with torch.no_grad(), routers.record(model) as outer:
        with routers.replay(model, trace), routers.record(model):
            model(tokens, use_cache=False)
        model(tokens, use_cache=False)
    replayed, native = outer.traces()
    np.testing.assert_array_equal(replayed.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(native.expert_ids, recorded(model, tokens).expert_ids)
    clean(model)


def test_routers_of_different_sizes_are_refused():
    model = nn.ModuleList([nn.Linear(4, 8), nn.Linear(4, 16)])
    hooks = RouterHooks(
        lambda m: {str(i): layer for i, layer in enumerate(m)},
        lambda router: SimpleNamespace(),
        lambda router: (2, router.out_features),
        lambda module: False,
    )
    with pytest.raises(
        ValueError, match=r"must agree in \(top_k, num_experts\): got \[\(2, 8\), \(2, 16\)\]"
    ):
        hooks.shape(model)


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
    with pytest.raises(
        RoutingReplayError, match=r"layers\.0\.mlp\.gate used 1 of 1 .* 0 of 1 .*2 more routers"
    ):
        run_under(model, random_trace(5), lambda: loss_of(model, tokens))
    clean(model)
    with torch.no_grad(), routers.replay(model, random_trace(5)):
        loss_of(model, tokens)  # nothing will be recomputed: one use is the law


def test_leaving_without_a_forward_is_refused(make_model, random_trace, clean):
    model = make_model(0)
    with pytest.raises(RoutingReplayError, match=r"model\.layers\.0\.mlp\.gate used 0 of 1 routes"):
        run_under(model, random_trace(5), lambda: None)
    clean(model)


def test_a_second_forward_is_refused_at_the_first_router(make_model, tokens, random_trace, clean):
    model = make_model(0)

    def twice():
        model(tokens, use_cache=False)
        model(tokens, use_cache=False)

    with pytest.raises(RoutingReplayError, match=r"model\.layers\.0\.mlp\.gate asked for route 2 of 1"):
        run_under(model, random_trace(5), twice)
    clean(model)


@pytest.mark.parametrize("count", [22, 24])
def test_a_forward_over_fewer_or_more_tokens_than_the_trace_is_refused(
    make_model, random_trace, clean, count
):
    model = make_model(0)
    tokens = torch.zeros(1, count, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=rf"layers\.0\.mlp\.gate must have one row per token: got 23 rows for {count} tokens"
    ):
        run_under(model, random_trace(5), lambda: model(tokens, use_cache=False))
    clean(model)


def test_a_forward_that_skips_a_router_is_refused(make_model, tokens, random_trace, clean, monkeypatch):
    model = make_model(0)
    last = model.model.layers[3].mlp
    monkeypatch.setattr(last, "forward", lambda hidden: hidden)  # its gate is never called
    with pytest.raises(RoutingReplayError, match=r"model\.layers\.3\.mlp\.gate used 0 of 1"):
        run_under(model, random_trace(5), lambda: model(tokens, use_cache=False))
    clean(model)


def test_a_recording_of_a_part_of_the_model_is_refused(make_model):
    model = make_model(0)
    with routers.record(model) as recorder:
        model.model.layers[0].mlp(torch.randn(1, 4, 16))
    with pytest.raises(
        RoutingReplayError, match=r"layers\.2\.mlp\.gate saw 0 and .*layers\.0\.mlp\.gate saw 1"
    ):
        recorder.trace()


def test_an_exception_inside_passes_through_and_leaves_the_model_clean(
    make_model, tokens, random_trace, clean
):
    model = make_model(0)
    loss, grads = trained(model, tokens)

    def fails():
        with routers.record(model):
            model(tokens, use_cache=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_under(model, random_trace(5), fails)
    clean(model)
    again, new_grads = trained(model, tokens)
    assert torch.equal(loss, again)
    assert same_bits(grads, new_grads)


def test_a_second_replay_is_refused_and_does_not_disturb_the_first(make_model, tokens, random_trace, clean):
    model = make_model(0)
    trace = random_trace(5)
    with torch.no_grad(), routers.replay(model, trace):
        with pytest.raises(RoutingReplayError, match="being replayed already"):
            run_under(model, random_trace(6), lambda: None)
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
        routers.record(model) as used,
        routers.replay(model, partial) as feeder,
    ):
        model(tokens, use_cache=False)
    np.testing.assert_array_equal(used.trace().expert_ids[known], trace.expert_ids[known])
    # nothing upstream of the first router is replayed: there the own choice is that of a plain forward
    np.testing.assert_array_equal(
        used.trace().expert_ids[~known, 0], recorded(model, tokens).expert_ids[~known, 0]
    )
    # later routers chose for themselves too: [0, 0], which the trace holds there, is no choice
    assert (used.trace().expert_ids[~known, 1:].max(-1) > 0).all()
    assert (feeder.rows, feeder.native_rows) == (23, 3)


def test_a_wholly_unknown_trace_is_plain_routing_bit_for_bit(make_model, tokens, random_trace):
    model = make_model(0)
    nothing = RoutingTrace(np.zeros((23, 3, 2), np.uint8), np.zeros(23, np.bool_), 8)
    loss, grads = trained(model, tokens)
    replayed_loss, replayed_grads = trained(model, tokens, nothing)
    assert torch.equal(loss, replayed_loss)
    assert same_bits(grads, replayed_grads)


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
