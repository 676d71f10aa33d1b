"""Record and replay at megatron-core's extension point, with stand-ins for its routers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from gspo_dist.routing.megatron import Routers
from gspo_dist.routing.replay import RoutingReplayError
from gspo_dist.routing.trace import RouterScores, RoutingTrace

MOE_LAYERS = (True, False, True, True)


@pytest.fixture
def one_rank(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    mpu.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def make_routers(numbers=(1, 3, 4), moe_layers=MOE_LAYERS, sequence_parallel=False):
    """megatron numbers layers from 1: routers of the layers 0, 2 and 3, unless said otherwise."""
    config = SimpleNamespace(moe_router_fusion=False)
    routers = [SimpleNamespace(layer_number=n, config=config) for n in numbers]
    return Routers(routers, moe_layers, 2, 8, False, sequence_parallel), routers


def item(trace, source, tokens=None):
    """A micro-batch whose row i holds token source[i]."""
    batch = SimpleNamespace(routing=trace, num_tokens=len(trace) if tokens is None else tokens)
    return SimpleNamespace(batch=batch, source=torch.tensor(source))


def forward(routers, scores):
    """Every router's choice for its scores [N, 8]."""
    return [
        router.router_replay.get_replay_topk(scores, 2, None, None, lambda s, k, **_: s.topk(k, dim=1))
        for router in routers
    ]


def test_routers_take_their_own_columns_and_the_scores_of_now(one_rank, random_trace):
    """A stage with layers 2 and 3 of T F T T has columns 1 and 2 of the trace."""
    handles, routers = make_routers(numbers=(3, 4))
    assert handles.columns == [1, 2]
    assert handles.shape.names == ("decoder.layers.2.mlp.router", "decoder.layers.3.mlp.router")
    trace = random_trace(0, tokens=5)
    scores = torch.rand(5, 8)
    with torch.no_grad(), handles.replaying([item(trace, range(5))]):
        chosen = forward(routers, scores)
    for (values, ids), column in zip(chosen, (1, 2), strict=True):
        np.testing.assert_array_equal(ids.numpy(), trace.expert_ids[:, column])
        assert torch.equal(values, scores.gather(1, ids))
    values, ids = forward(routers, scores)[0]
    assert torch.equal(ids, scores.topk(2).indices)  # outside the block the choice is the router's own


def test_padding_and_unrecorded_rows_are_routed_natively(one_rank, random_trace):
    """Rows hold tokens 2, 0, padding and 1; token 0 was not recorded."""
    handles, routers = make_routers()
    trace = random_trace(0, tokens=3)
    trace.known[0] = False
    scores = torch.rand(4, 8)
    with torch.no_grad(), handles.replaying([item(trace, [2, 0, -1, 1])]):
        ids = forward(routers, scores)[1][1].numpy()
    native = scores.topk(2).indices.numpy()
    np.testing.assert_array_equal(ids, [trace.expert_ids[2, 1], native[1], native[2], trace.expert_ids[1, 1]])


def test_a_batch_without_a_trace_among_others_is_routed_natively(one_rank, random_trace):
    handles, routers = make_routers()
    trace = random_trace(0, tokens=3)
    scores = torch.rand(3, 8)
    with torch.no_grad(), handles.replaying([item(None, range(3), 3), item(trace, range(3))]):
        first, second = forward(routers, scores), forward(routers, scores)
    assert torch.equal(first[0][1], scores.topk(2).indices)
    np.testing.assert_array_equal(second[0][1].numpy(), trace.expert_ids[:, 0])


def run_replay(handles, items, run):
    with torch.no_grad(), handles.replaying(items):
        run()


@pytest.mark.parametrize(
    ("forwards", "message"),
    [
        (0, r"decoder\.layers\.0\.mlp\.router used 0 of 1 routes in the forward"),
        (2, r"decoder\.layers\.0\.mlp\.router asked for route 2 of 1"),
    ],
)
def test_a_pass_that_is_not_one_forward_is_refused(one_rank, random_trace, forwards, message):
    handles, routers = make_routers()
    with pytest.raises(RoutingReplayError, match=message):
        run_replay(
            handles,
            [item(random_trace(0, tokens=3), range(3))],
            lambda: [forward(routers, torch.rand(3, 8)) for _ in range(forwards)],
        )
    assert all(handle.replay is None for handle in handles.handles)


@pytest.mark.parametrize("rows", [2, 4])
def test_fewer_or_more_rows_than_the_trace_are_refused(one_rank, random_trace, rows):
    handles, routers = make_routers()
    with pytest.raises(ValueError, match=f"must have one row per token: got 3 rows for {rows} tokens"):
        run_replay(
            handles,
            [item(random_trace(0, tokens=3), range(3))],
            lambda: forward(routers, torch.rand(rows, 8)),
        )


def test_a_trace_of_another_length_than_its_batch_is_refused(one_rank, random_trace):
    handles, _ = make_routers()
    with pytest.raises(ValueError, match="got 3 for 4 tokens; mark unrecorded rows unknown"):
        run_replay(handles, [item(random_trace(0, tokens=3), range(4), tokens=4)], lambda: None)


def test_sequence_parallel_ranks_see_their_part_of_the_rows(one_rank, monkeypatch, random_trace):
    """Tensor rank 1 of 2 sees rows 3 to 5 of six: tokens 3, 4 and padding."""
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_rank", lambda: 1)
    handles, routers = make_routers(sequence_parallel=True)
    trace = random_trace(0, tokens=5)
    scores = torch.rand(3, 8)
    with torch.no_grad(), handles.replaying([item(trace, [0, 1, 2, 3, 4, -1])]):
        ids = forward(routers, scores)[2][1].numpy()
    np.testing.assert_array_equal(ids[:2], trace.expert_ids[3:, 2])
    np.testing.assert_array_equal(ids[2], scores[2].topk(2).indices.numpy())


def test_recorded_rows_come_back_in_the_order_of_the_tokens(one_rank):
    """Two micro-batches of tokens in another order, with padding: padding is left out."""
    handles, routers = make_routers()
    items = [item(None, [2, 0, -1, 1], 3), item(None, [1, 0], 2)]
    scores = [torch.rand(4, 8), torch.rand(2, 8)]
    with handles.recording() as recorder:
        for part in scores:
            forward(routers, part)
    traces = handles.gather(recorder, items)
    assert [len(t) for t in traces] == [3, 2]
    for trace, part, order in zip(traces, scores, ([1, 3, 0], [1, 0]), strict=True):
        want = part.topk(2).indices.numpy()[order]
        for column in range(3):
            np.testing.assert_array_equal(trace.expert_ids[:, column], want)
        assert trace.known.all()
    forward(routers, scores[0])
    assert recorder.traces()[-1].expert_ids.shape == (2, 3, 2)  # nothing is recorded after the block


def test_under_a_replay_the_replayed_experts_are_recorded(one_rank, random_trace):
    handles, routers = make_routers()
    trace = random_trace(0, tokens=3)
    items = [item(trace, range(3))]
    with torch.no_grad(), handles.recording() as recorder, handles.replaying(items):
        forward(routers, torch.rand(3, 8))
    np.testing.assert_array_equal(handles.gather(recorder, items)[0].expert_ids, trace.expert_ids)


def test_dense_models_and_fused_routers_are_refused(one_rank, random_trace):
    handles, _ = make_routers(numbers=(), moe_layers=(False,) * 4)
    with pytest.raises(ValueError, match="use routing_replay=none for a dense one"):
        run_replay(handles, [item(random_trace(0, tokens=3), range(3))], lambda: None)
    with handles.recording() as recorder, pytest.raises(ValueError, match="recording routes needs"):
        handles.gather(recorder, [item(None, range(3), 3)])
    fused = SimpleNamespace(layer_number=1, config=SimpleNamespace(moe_router_fusion=True))
    with pytest.raises(ValueError, match=r"moe_router_fusion .* must be off"):
        Routers([fused], MOE_LAYERS, 2, 8, False, False)


def test_without_any_trace_nothing_is_replayed(one_rank):
    handles, routers = make_routers()
    scores = torch.rand(3, 8)
    with handles.replaying([item(None, range(3), 3)]):
        assert torch.equal(forward(routers, scores)[0][1], scores.topk(2).indices)


def test_a_stage_of_dense_layers_takes_part_without_routers(one_rank, random_trace):
    handles, _ = make_routers(numbers=())
    items = [item(random_trace(0, tokens=3), range(3))]
    run_replay(handles, items, lambda: None)
    with handles.recording() as recorder:
        pass
    trace = handles.gather(recorder, items)[0]
    assert isinstance(trace, RoutingTrace)
    assert not trace.expert_ids.any()


# --- what the routers think of their experts ---


def choose(routers, logits):
    """Every router's choice by the softmax with a bias, after it has shown its logits."""
    scores = logits.softmax(1) + torch.linspace(0, 1, 8)
    for router in routers:
        router.router_replay.show(logits)
    return forward(routers, scores)


def test_scores_are_of_the_logits_whatever_the_router_chooses_by(one_rank):
    """Rows hold tokens 2, 0, padding and 1, of two micro-batches: log-probs come back by token."""
    handles, routers = make_routers()
    items = [item(None, [2, 0, -1, 1], 3), item(None, [1, 0], 2)]
    logits = [torch.randn(4, 8), torch.randn(2, 8)]
    with handles.scoring() as recorder:
        chosen = [choose(routers, part)[0][1] for part in logits]
    found = handles.gather_scores(recorder, items)
    for scores, part, ids, order in zip(found, logits, chosen, ([1, 3, 0], [1, 0]), strict=True):
        assert scores.logprobs.shape == (len(order), 3, 2)
        want = part.log_softmax(1).gather(1, ids)[order]
        for column in range(3):
            assert torch.equal(scores.expert_ids[:, column], ids[order].int())
            torch.testing.assert_close(scores.logprobs[:, column], want, rtol=0, atol=1e-6)
    assert all(handle.watcher is None and handle.logits is None for handle in handles.handles)


def with_scores(one, old):
    one.batch.old_router = old
    return one


def test_a_stage_measures_its_own_layers_against_the_old_scores_of_its_rows(one_rank):
    """Layers 2 and 3 of T F T T are columns 1 and 2: 0.5 and 0.1 nats off. Column 0 is another stage's."""
    handles, routers = make_routers(numbers=(3, 4))
    logits = torch.zeros(3, 8)
    ids = torch.zeros(2, 3, 2, dtype=torch.int32)
    off = torch.tensor([9.0, 0.5, -0.1])[None, :, None] + torch.tensor([0.0, 1.0])[:, None, None]
    old = RouterScores(ids, -np.log(8) + off.expand(2, 3, 2))
    with handles.metering([with_scores(item(None, [1, 0, -1], 2), old)]) as meter:
        choose(routers, logits)
    shift = handles.shift(meter, 0)
    assert shift[:2].tolist() == pytest.approx([np.exp(-(1.5 + 0.9) / 3), np.exp(-(0.5 + 0.1) / 3)])


def test_a_stage_without_routers_takes_part_in_scores_and_shift(one_rank):
    handles, _ = make_routers(numbers=())
    one = item(None, range(3), 3)
    with handles.scoring() as recorder:
        pass
    (scores,) = handles.gather_scores(recorder, [one])
    assert scores.logprobs.shape == (3, 3, 2)
    with handles.metering([with_scores(one, scores)]) as meter:
        pass
    assert handles.shift(meter, 0).tolist() == [1.0] * 3


def test_scores_that_cannot_be_had_are_refused(one_rank):
    dense, _ = make_routers(numbers=(), moe_layers=(False,) * 4)
    with pytest.raises(ValueError, match="need a mixture-of-experts model"), dense.scoring():
        pass
    handles, routers = make_routers()
    with handles.scoring(), pytest.raises(RuntimeError, match="without showing its logits"):
        forward(routers, torch.rand(3, 8))
    lacking = with_scores(item(None, range(3), 3), None)
    with pytest.raises(ValueError, match="no router scores"), handles.metering([lacking]):
        pass
