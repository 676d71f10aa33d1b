"""Records that travel between processes."""

from __future__ import annotations

import pickle

import numpy as np

from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import NO_VERSION, Completion, Prompt, SamplingSpec, Turn, Work, environment_tokens


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
        (Turn(0, 0, 1, "", "hi"), Turn(1, 2, 3, "a", "b", 0.5, {"n": 1.0})),
    )
    got = pickle.loads(pickle.dumps(sent))
    for name in ("token_ids", "loss_mask", "logprobs", "policy_versions"):
        a, b = getattr(sent, name), getattr(got, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert (got.finish_reason, got.text) == ("stop", "käse")
    assert got.turns == sent.turns
    assert np.array_equal(got.routing.expert_ids, ids)
    assert np.array_equal(got.routing.known, routing.known)


def test_a_lists_token_ids_arrive_as_int64():
    """Ids given in a narrower type (an engine's int32) are not read back as half as many numbers."""
    zeros = np.zeros(2)
    sent = Completion(
        np.array([5, 6], np.int32), zeros.astype(bool), zeros, zeros.astype(np.int64), "length", ""
    )
    assert pickle.loads(pickle.dumps(sent)).token_ids.tolist() == [5, 6]


def test_what_an_environment_says_is_appended_without_a_version():
    """And its routes are unknown until the next turn is read; those before stay."""
    ids = np.arange(3 * 1 * 2, dtype=np.uint8).reshape(3, 1, 2)
    routing = RoutingTrace(ids, np.array([1, 1, 0], bool), num_experts=9)
    sampled = Completion(np.array([5, 6]), np.ones(2, bool), np.full(2, -1.0), np.full(2, 4), "", "", routing)
    joined = sampled.extend(environment_tokens([8, 9]))
    assert joined.token_ids.tolist() == [5, 6, 8, 9]
    assert joined.loss_mask.tolist() == [True, True, False, False]
    assert joined.logprobs.tolist() == [-1.0, -1.0, 0.0, 0.0]
    assert joined.policy_versions.tolist() == [4, 4, NO_VERSION, NO_VERSION]
    assert joined.routing.known.tolist() == [True, True, False, False, False]
    assert joined.routing.expert_ids[:2].tolist() == ids[:2].tolist()


def test_a_turn_has_a_limit_within_the_episodes():
    so_far = environment_tokens([1, 2, 3])
    work = Work(0, 0, Prompt("p", (1,), ""), SamplingSpec(n=1, max_tokens=20), so_far)
    assert work.left == 17
    assert Work(0, 0, work.prompt, work.spec, so_far, until=8).left == 5
