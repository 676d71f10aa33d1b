"""The bookkeeping of a replay: each route once per pass, or an error that names the router."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gspo_dist.routing.replay import (
    RouteFeeder,
    RouteRecorder,
    RouterShape,
    RoutingReplayError,
    check_trace,
    feeding,
    in_backward,
    merge_known,
)
from gspo_dist.routing.trace import RoutingTrace

SHAPE = RouterShape(("first", "second", "third"), 2, 8)
NATIVE = torch.tensor([[6, 7]]).expand(23, 2)


def test_unknown_rows_keep_the_native_choice():
    native = torch.tensor([[0, 1], [2, 3], [4, 5]])
    target = torch.tensor([[7, 6], [5, 4], [3, 2]])
    merged = merge_known(native, target, torch.tensor([True, False, True]))
    assert merged.tolist() == [[7, 6], [2, 3], [3, 2]]


def test_forwards_and_recomputations_advance_separately_as_a_pipeline_schedule_needs(random_trace):
    """1F1B: forward 0, forward 1, backward 0 (recomputes 0), forward 2, backward 1, backward 2."""
    traces = [random_trace(seed, tokens=5) for seed in range(3)]
    shape = RouterShape(("only",), 2, 8)
    feeder = RouteFeeder(traces, shape, "cpu", columns=[1], recompute=True)
    layer, native = feeder.layers[0], torch.zeros(5, 2, dtype=torch.int64)
    seen = []

    def run(x):
        seen.append((in_backward(), layer.choose(native).clone()))
        return x * x

    x = torch.ones(1, requires_grad=True)
    with feeding(feeder):
        outs = [checkpoint(run, x, use_reentrant=False), checkpoint(run, x, use_reentrant=False)]
        outs[0].backward()
        outs.append(checkpoint(run, x, use_reentrant=False))
        outs[1].backward()
        outs[2].backward()
    order = [(False, 0), (False, 1), (True, 0), (False, 2), (True, 1), (True, 2)]
    assert [again for again, _ in seen] == [again for again, _ in order]
    for (_, ids), (_, micro) in zip(seen, order, strict=True):
        np.testing.assert_array_equal(ids.numpy(), traces[micro].expert_ids[:, 1])


def test_every_route_is_used_exactly_once(random_trace):
    def block(uses, **kwargs):
        feeder = RouteFeeder([random_trace(0)], SHAPE, "cpu", **kwargs)
        with feeding(feeder):
            for layer, times in zip(feeder.layers, uses, strict=True):
                for _ in range(times):
                    layer.choose(NATIVE)

    block([1, 1, 1])
    with pytest.raises(RoutingReplayError, match="router second used 0 of 1 routes in the forward"):
        block([1, 0, 1])
    with pytest.raises(RoutingReplayError, match="router third asked for route 2 of 1"):
        block([1, 1, 2])
    with pytest.raises(
        RoutingReplayError, match=r"router second used 1 of 1 .* and 0 of 1 in the recomputed"
    ):
        block([1, 1, 1], recompute=[False, True, False])
    with pytest.raises(ValueError, match="one entry per router"):
        block([1, 1, 1], recompute=[True])


def test_a_recomputation_that_nobody_expected_is_refused(random_trace):
    feeder = RouteFeeder([random_trace(0)], SHAPE, "cpu")
    x = torch.ones(1, requires_grad=True)

    def run(x):
        for layer in feeder.layers:
            layer.choose(NATIVE)
        return x * x

    with (
        pytest.raises(RoutingReplayError, match="router first used 1 of 1 routes in the forward and 1 of 0"),
        feeding(feeder),
    ):
        checkpoint(run, x, use_reentrant=False).backward()


def test_an_exception_inside_is_not_replaced_by_the_count(random_trace):
    with pytest.raises(KeyError), feeding(RouteFeeder([random_trace(0)], SHAPE, "cpu")):
        raise KeyError("mine")


def test_ids_of_all_65536_experts_survive_the_device_and_back():
    ids = np.array([[[0, 255]], [[256, 32767]], [[32768, 65535]]], np.uint16)
    trace = RoutingTrace(ids, np.ones(3, np.bool_), 65536)
    shape = RouterShape(("only",), 2, 65536)
    for dtype in (torch.int64, torch.int32):
        feeder = RouteFeeder([trace], shape, "cpu")
        chosen = feeder.layers[0].choose(torch.zeros(3, 2, dtype=dtype))
        assert chosen.dtype == dtype
        assert chosen.tolist() == ids[:, 0].tolist()
    recorder = RouteRecorder(shape)
    recorder.see(0, torch.from_numpy(ids[:, 0].astype(np.int64)))
    np.testing.assert_array_equal(recorder.trace().expert_ids, ids)


def test_arrays_of_an_object_store_are_taken_without_being_written_to(random_trace):
    trace = random_trace(0, layers=1)
    trace.known[3] = False
    trace.expert_ids.flags.writeable = trace.known.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feeder = RouteFeeder([trace], RouterShape(("only",), 2, 8), "cpu")
    feeder.layers[0].choose(NATIVE).zero_()


def test_bytes_held_on_the_device_are_one_an_id(random_trace):
    full, partial = random_trace(0), random_trace(1)
    partial.known[0] = False
    feeder = RouteFeeder([full, partial], SHAPE, "cpu")
    assert feeder.nbytes == 2 * 23 * 3 * 2 + 23  # the second needs its marks: a byte a token
    assert (feeder.rows, feeder.native_rows) == (46, 1)
    recorder = RouteRecorder(SHAPE)
    for layer in range(3):
        recorder.see(layer, NATIVE)
    assert recorder.nbytes == recorder.trace().expert_ids.nbytes == 23 * 3 * 2


def test_a_recording_needs_every_router_once_and_one_forward(random_trace):
    recorder = RouteRecorder(SHAPE)
    with pytest.raises(RoutingReplayError, match="the routers saw 0"):
        recorder.trace()
    for layer in (0, 1):
        recorder.see(layer, NATIVE)
    with pytest.raises(RoutingReplayError, match="router third saw 0 and router first saw 1"):
        recorder.traces()
    recorder.see(2, NATIVE)
    assert len(recorder.traces()) == 1
    for layer in range(3):
        recorder.see(layer, NATIVE)
    assert len(recorder.traces()) == 2
    with pytest.raises(RoutingReplayError, match="the routers saw 2"):
        recorder.trace()


@pytest.mark.parametrize("top_k", [2, 3, 4, 5, 8])
def test_every_pair_of_equal_ids_in_a_row_is_found(random_trace, top_k):
    shape = RouterShape(("first", "second"), top_k, 8)
    for i in range(top_k):
        for j in range(i):
            trace = random_trace(0, tokens=4, layers=2, top_k=top_k)
            check_trace(trace, shape)
            trace.expert_ids[2, 1, i] = trace.expert_ids[2, 1, j]
            with pytest.raises(
                ValueError, match=r"must be distinct: got .* router second \(MoE layer 1\), token 2"
            ):
                check_trace(trace, shape)
            trace.known[2] = False
            check_trace(trace, shape)  # nobody recorded the row: it holds no routes


def test_ids_out_of_range_are_found_and_named(random_trace):
    trace = random_trace(0)
    trace.expert_ids[7, 2, 0] = 8
    with pytest.raises(
        ValueError, match=r"below num_experts 8: got \[8, \d\] at router third \(MoE layer 2\), token 7"
    ):
        RouteFeeder([trace], SHAPE, "cpu")


def test_a_pipeline_stage_takes_its_columns(random_trace):
    trace = random_trace(0, layers=5)
    feeder = RouteFeeder([trace], RouterShape(("third", "fourth"), 2, 8), "cpu", columns=[2, 3])
    for layer, column in zip(feeder.layers, (2, 3), strict=True):
        np.testing.assert_array_equal(layer.choose(NATIVE).numpy(), trace.expert_ids[:, column])
    with pytest.raises(ValueError, match="another model"):
        RouteFeeder([trace], RouterShape(("third", "fourth"), 2, 8), "cpu")
