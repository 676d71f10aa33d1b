"""Passes in packs of their own: every sequence once, within the budget, answers as the source is packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_dist.coldstart.model import build_model, save_model
from gspo_dist.coldstart.recipes import Shape
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.config import LearnerConfig
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.forward import in_groups, logprobs_within, repacked
from gspo_dist.learners.group import LocalLearnerGroup
from gspo_dist.packing import pack
from gspo_dist.routing.trace import RouterScores, RoutingTrace
from gspo_dist.types import LogprobOutput, PackedBatch
from tests.unit.trainer.small import rollout, trace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, expert_hidden=16)
    save_model(build_model(shape, seed=0), folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def mini_of(lengths, replicas: int, token_budget: int):
    """Rollout i has prompt (1, 2) and a completion of lengths[i] tokens 10 + i."""
    rollouts = [rollout(i, tokens=(10 + i,) * n) for i, n in enumerate(lengths)]
    (mini,) = pack(
        rollouts,
        [1.0] * len(rollouts),
        replicas=replicas,
        token_budget=token_budget,
        mini_batches=1,
        max_completion_length=64,
        seed=(0,),
    )
    return mini


def told(batch: PackedBatch) -> LogprobOutput:
    """Numbers that name a token: its sequence by the id, its place by the position."""
    name = 100.0 * batch.token_ids + batch.position_ids
    ids = torch.stack([batch.token_ids % 8, batch.position_ids % 8], 1)[:, None]
    known = (batch.position_ids % 3 > 0).numpy()
    return LogprobOutput(
        name.float(),
        -name.float(),
        RoutingTrace(ids.numpy().astype(np.uint8), known, 8),
        RouterScores(ids.int(), ids.float() + name[:, None, None]),
    )


def assert_same(got: LogprobOutput, want: LogprobOutput) -> None:
    assert torch.equal(got.logprobs, want.logprobs)
    assert torch.equal(got.entropy, want.entropy)
    assert (got.routing.expert_ids == want.routing.expert_ids).all()
    assert (got.routing.known == want.routing.known).all()
    assert torch.equal(got.router.expert_ids, want.router.expert_ids)
    assert torch.equal(got.router.logprobs, want.router.logprobs)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=24),
    replicas=st.integers(1, 4),
    spare=st.integers(0, 40),
    forward=st.integers(0, 200),
)
def test_every_sequence_runs_once_within_the_budget_and_comes_back_to_its_place(
    lengths, replicas, spare, forward
):
    mini = mini_of(lengths, replicas, max(lengths) + 2 + spare)
    budget = max(lengths) + 2 + forward
    work = repacked(mini.micro_batches, budget)
    passes = [batch for batches in work.micro_batches for batch in batches]
    assert len({len(batches) for batches in work.micro_batches}) == 1  # collectives pair up
    assert all(batch.num_tokens <= budget for batch in passes)
    trained = sorted(
        int(batch.rollout_index[s])
        for batch in passes
        for s in range(batch.num_sequences)
        if batch.has_trained_tokens(s)
    )
    assert trained == list(range(len(lengths)))
    restored = work.restored([[told(batch) for batch in batches] for batches in work.micro_batches])
    for batches, outputs in zip(mini.micro_batches, restored, strict=True):
        for batch, output in zip(batches, outputs, strict=True):
            assert_same(output, told(batch))


def test_a_budget_of_all_tokens_is_one_pass_of_each_replica():
    mini = mini_of([6, 4, 5, 3, 2, 8], 2, 10)
    assert sum(1 for _ in mini.batches()) == 6
    work = repacked(mini.micro_batches, 20)
    assert [[b.num_tokens for b in batches] for batches in work.micro_batches] == [[20], [20]]
    with pytest.raises(ValueError, match=r"must hold every sequence: got 9 for one of 10"):
        repacked(mini.micro_batches, 9)


class Group:
    """Answers by `told`, and keeps what it was given."""

    def logprobs(self, micro_batches, **options):
        self.given, self.options = micro_batches, options
        return [[told(batch) for batch in batches] for batches in micro_batches]


def test_no_budget_computes_the_micro_batches_as_they_are_packed():
    mini, group = mini_of([6, 4, 5], 1, 12), Group()
    outputs, passes = logprobs_within(group, mini.micro_batches, None, reference=True)
    assert group.given is mini.micro_batches
    assert group.options == {"reference": True}
    assert passes == 3
    for batch, output in zip(mini.batches(), outputs[0], strict=True):
        assert_same(output, told(batch))


def test_what_is_attached_is_attached_to_the_packs():
    mini, group = mini_of([6, 4, 5], 1, 12), Group()

    def attach(batches):
        return [[b.with_(routing=trace(b.num_tokens, 3)) for b in own] for own in batches]

    _, passes = logprobs_within(group, mini.micro_batches, 64, attach=attach)
    assert passes == 1
    assert [len(b.routing) for own in group.given for b in own] == [21]


def test_groups_of_micro_batches_keep_order_routes_and_scores():
    mini = mini_of([6, 4, 5, 3, 7], 1, 10)
    batches = [b.with_(routing=told(b).routing, old_router=told(b).router) for b in mini.micro_batches[0]]
    assert len(batches) == 5
    groups = in_groups(batches, 2)
    assert [g.num_sequences for g in groups] == [2, 2, 1]
    assert groups[2] is batches[4]
    for group, own in zip(groups, (batches[:2], batches[2:4], batches[4:]), strict=True):
        assert torch.equal(group.token_ids, torch.cat([b.token_ids for b in own]))
        assert torch.equal(group.old_router.logprobs, torch.cat([b.old_router.logprobs for b in own]))
        assert (group.routing.known == np.concatenate([b.routing.known for b in own])).all()
    assert in_groups([b.with_(old_router=None) for b in batches], 5)[0].old_router is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("budget", [24, 40, 1000])
def test_log_probs_recorded_routes_and_replays_do_not_depend_on_the_packs(model, precision, budget):
    """Up to the rounding of matrix products with other rows; replayed routes are equal in any case."""
    config = LearnerConfig(backend="eager", precision=precision, token_budget=30)
    group = LocalLearnerGroup(EagerLearner(config, model, total_steps=1))
    mini = mini_of([20, 9, 14, 3, 22, 17], 1, 30)
    want, as_packed = logprobs_within(group, mini.micro_batches, None, record_routing=True)
    got, passes = logprobs_within(group, mini.micro_batches, budget, record_routing=True)
    assert passes == {24: 5, 40: 3, 1000: 1}[budget] != as_packed
    close = {"fp32": 2e-6, "bf16": 0.03}[precision]
    for batch, one, other in zip(mini.batches(), want[0], got[0], strict=True):
        assert one.logprobs[batch.loss_mask].abs().min() > 0.1  # nothing is compared with zeros
        torch.testing.assert_close(other.logprobs, one.logprobs, rtol=0, atol=close)
        torch.testing.assert_close(other.entropy, one.entropy, rtol=0, atol=close)
        if precision == "fp32":
            assert (other.routing.expert_ids == one.routing.expert_ids).all()
    foreign = RoutingTrace(7 - want[0][0].routing.expert_ids, want[0][0].routing.known, 8)
    routed = [[b.with_(routing=o.routing) for b, o in zip(mini.batches(), want[0], strict=True)]]
    routed[0][0] = routed[0][0].with_(routing=foreign)
    free, (replayed, _) = got, logprobs_within(group, routed, budget)
    (plain, _) = logprobs_within(group, routed, None)
    for one, other in zip(plain[0], replayed[0], strict=True):
        torch.testing.assert_close(other.logprobs, one.logprobs, rtol=0, atol=close)
    assert (replayed[0][0].logprobs - free[0][0].logprobs).abs().max() > 0.05  # other experts were replayed
