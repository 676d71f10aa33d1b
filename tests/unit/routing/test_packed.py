"""Replay through the packed path that every HF learner uses."""

import numpy as np
import pytest
import torch

from gspo_dist.learners import attention
from gspo_dist.learners.eager import hf_logprobs
from gspo_dist.learners.hf_model import PolicyModel
from gspo_dist.packing import attach_traces, pack_sequences
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import Completion, Prompt, Rollout

LENGTHS = ((3, 5), (1, 2), (4, 7))  # prompt, completion


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
