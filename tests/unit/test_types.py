"""Records that travel between processes."""

from __future__ import annotations

import pickle

import numpy as np

from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import Completion


def test_a_completion_survives_the_trip_to_another_process():
    ids = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2)
    routing = RoutingTrace(ids, np.array([1, 1, 1, 1, 0], bool), num_experts=20)
    sent = Completion(
        np.array([7, 1 << 40, 9]),
        np.array([True, False, True]),
        np.array([-0.1, -2.5, -1e-8], np.float32),
        np.array([3, 3, 4], np.int32),
        "stop",
        "käse",
        routing,
    )
    got = pickle.loads(pickle.dumps(sent))
    for name in ("token_ids", "loss_mask", "logprobs", "policy_versions"):
        a, b = getattr(sent, name), getattr(got, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert (got.finish_reason, got.text) == ("stop", "käse")
    assert np.array_equal(got.routing.expert_ids, ids)
    assert np.array_equal(got.routing.known, routing.known)


def test_a_lists_token_ids_arrive_as_int64():
    """Ids given in a narrower type (an engine's int32) are not read back as half as many numbers."""
    zeros = np.zeros(2)
    sent = Completion(
        np.array([5, 6], np.int32), zeros.astype(bool), zeros, zeros.astype(np.int64), "length", ""
    )
    assert pickle.loads(pickle.dumps(sent)).token_ids.tolist() == [5, 6]
