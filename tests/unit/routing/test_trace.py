"""Traces as data: slices, concatenation, the smallest type, and what each mode costs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo_dist.packing import attach_traces, pack_sequences
from gspo_dist.routing.trace import ReplayBytes, RoutingTrace, id_dtype, replay_bytes, trace_bytes
from gspo_dist.types import Completion, Prompt, Rollout


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 10**6))
def test_concatenating_and_slicing_by_sequence_is_the_identity(lengths, seed):
    rng = np.random.default_rng(seed)
    parts = [
        RoutingTrace(rng.integers(0, 8, (n, 3, 2), dtype=np.uint8), rng.random(n) < 0.7, 8) for n in lengths
    ]
    whole = RoutingTrace.concat(parts)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    for i, part in enumerate(parts):
        piece = whole[cu[i] : cu[i + 1]]
        np.testing.assert_array_equal(piece.expert_ids, part.expert_ids)
        np.testing.assert_array_equal(piece.known, part.known)
    assert whole.unknown_rows == sum(int((~p.known).sum()) for p in parts)
    order = rng.permutation(len(whole))
    np.testing.assert_array_equal(whole[order][np.argsort(order)].expert_ids, whole.expert_ids)


def test_packing_carries_the_routes_of_every_token(random_trace):
    def rollout(i, prompt, new):
        completion = Completion(
            np.arange(new),
            np.ones(new, np.bool_),
            np.zeros(new, np.float32),
            np.zeros(new, np.int32),
            "stop",
            "",
            random_trace(i, tokens=prompt + new),
        )
        return Rollout(i, i, Prompt(str(i), tuple(range(prompt)), "", None), completion, 0.0)

    rollouts = [rollout(0, 2, 3), rollout(1, 1, 4), rollout(2, 3, 1)]
    batch = attach_traces(pack_sequences(rollouts, [0.0, 0.0, 0.0], [2, 0]), rollouts)
    cu = batch.cu_seqlens.tolist()
    for s, i in enumerate(batch.rollout_index.tolist()):
        want = rollouts[i].completion.routing.expert_ids
        np.testing.assert_array_equal(batch.routing[cu[s] : cu[s + 1]].expert_ids, want)


def test_the_engines_missing_tail_is_unknown():
    trace = RoutingTrace.from_engine(np.full((4, 3, 2), 7, np.int32), 5, 8)
    assert trace.known.tolist() == [True] * 4 + [False]
    assert trace.unknown_rows == 1
    assert trace.expert_ids.dtype == np.uint8
    assert trace.expert_ids[4].sum() == 0
    with pytest.raises(ValueError, match="6 rows for a sequence of 5 tokens"):
        RoutingTrace.from_engine(np.zeros((6, 3, 2), np.uint8), 5, 8)


def test_ids_use_the_smallest_type():
    assert [id_dtype(n).itemsize for n in (1, 8, 256, 257, 65536)] == [1, 1, 1, 2, 2]
    for n in (0, 65537):
        with pytest.raises(ValueError, match=r"1\.\.65536"):
            id_dtype(n)
    with pytest.raises(ValueError, match=r"uint16 for 300 experts: got .* uint8"):
        RoutingTrace(np.zeros((2, 3, 2), np.uint8), np.ones(2, np.bool_), 300)


def test_layers_are_the_columns_of_a_pipeline_stage(random_trace):
    trace = random_trace(0, layers=5)
    np.testing.assert_array_equal(trace.layers([3, 4]).expert_ids, trace.expert_ids[:, 3:])


def test_traces_of_different_models_do_not_mix(random_trace):
    with pytest.raises(ValueError, match="must agree"):
        RoutingTrace.concat([random_trace(0), random_trace(0, layers=2)])


def test_bytes_of_qwen3_30b_a3b():
    """48 layers, top-8 of 128: 384 bytes a token, an eighth of torch.topk's int64."""
    assert trace_bytes(1, 48, 8, 128) == 384
    assert trace_bytes(1024 * 32768, 48, 8, 128) == 12_884_901_888
    assert trace_bytes(1, 48, 8, 512) == 768
    ids = torch.zeros(10, 48, 8, dtype=torch.int64)
    assert ids.nbytes == 8 * trace_bytes(10, 48, 8, 128)


def test_what_each_mode_moves(random_trace):
    trace = random_trace(0)
    size = trace_bytes(23, 3, 2, 8)
    assert size == trace.expert_ids.nbytes == trace.nbytes - 23
    assert replay_bytes("none", size, recompute_old_logprobs=True) == ReplayBytes(0, 0, 0, 0)
    assert replay_bytes("r2", size, recompute_old_logprobs=True).device_copies == 2 * size
    assert replay_bytes("r3", size, recompute_old_logprobs=True).device_copies == 3 * size
    assert replay_bytes("r3", size, recompute_old_logprobs=False).device_copies == 2 * size
    with pytest.raises(ValueError, match="old_logprobs=recompute"):
        replay_bytes("r2", size, recompute_old_logprobs=False)
    with pytest.raises(ValueError, match="none, r2, r3"):
        replay_bytes("R3", size, recompute_old_logprobs=False)
