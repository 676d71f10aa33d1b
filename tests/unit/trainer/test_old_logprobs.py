"""Where a step's old log-probs come from, in every mode, and which passes that costs."""

from __future__ import annotations

import pytest
import torch

from gspo_dist.config import GuardConfig, ObjectiveConfig
from gspo_dist.objectives.objective import get_objective
from gspo_dist.objectives.offset import GuardDecision
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.old_logprobs import OldLogprobs
from tests.unit.trainer.small import BookLearner, packed, rollout, trace


def make(learner: BookLearner, **changes) -> OldLogprobs:
    config = ObjectiveConfig(**({"name": "gspo"} | changes))
    return OldLogprobs(
        config, learner, OffsetGuard(config, get_objective(config.name), learner, seed=0, token_budget=64)
    )


def two(routed: bool = False):
    return [rollout(i, routing=trace(5, i + 1) if routed else None) for i in range(2)]


def test_engine_log_probs_cost_no_pass_and_stay_as_packed():
    learner, rollouts = BookLearner(), two()
    old = make(learner)
    (mini,) = old.prepare(packed(rollouts), rollouts, 1)
    assert learner.calls == []
    assert [b.old_logprobs for b in mini.batches()] == [None]
    assert not old.recomputed
    assert old.metrics() == {"old_logprobs/recomputed": 0.0}


def test_recomputation_is_one_pass_per_mini_batch_and_its_output_is_attached():
    learner, rollouts = BookLearner(-2.5), two()
    old = make(learner, old_logprobs="recompute", guard=GuardConfig(action="off"))
    minis = old.prepare(packed(rollouts, mini_batches=2), rollouts, 1)
    assert learner.calls == [("logprobs", {"record_routing": False, "reference": False})] * 2
    for mini in minis:
        for batch in mini.batches():
            expected = torch.where(batch.loss_mask, -2.5, 0.0)
            assert torch.equal(batch.old_logprobs, expected)
            assert batch.routing is None
    assert old.metrics() == {"old_logprobs/recomputed": 1.0, "old_logprobs/micro_batches": 2.0}


def test_r2_records_in_that_pass_and_the_update_replays_it():
    learner, rollouts = BookLearner(route=lambda b: trace(b.num_tokens, 4)), two()
    old = make(
        learner, name="grpo", old_logprobs="recompute", routing_replay="r2", guard=GuardConfig(action="off")
    )
    (mini,) = old.prepare(packed(rollouts), rollouts, 1)
    assert learner.calls == [("logprobs", {"record_routing": True, "reference": False})]
    assert learner.routed == [[None]]  # recording replays nothing
    (batch,) = mini.batches()
    assert (batch.routing.expert_ids == trace(10, 4).expert_ids).all()
    assert old.with_routes(mini, rollouts) is mini


def test_router_scores_are_recorded_in_that_pass_for_the_objective_that_reads_them():
    learner, rollouts = BookLearner(), two()
    (mini,) = make(learner, name="rspo", old_logprobs="recompute", guard=GuardConfig(action="off")).prepare(
        packed(rollouts), rollouts, 1
    )
    asked = {"record_routing": False, "record_scores": True, "reference": False}
    assert learner.calls == [("logprobs", asked)]
    (batch,) = mini.batches()
    assert batch.old_router is not None
    assert batch.old_router.logprobs.shape == (10, 2, 1)


def test_r3_replays_the_engines_routes_in_the_pass_and_hands_the_update_a_copy_of_its_own():
    learner, rollouts = BookLearner(), two(routed=True)
    old = make(
        learner, name="grpo", old_logprobs="recompute", routing_replay="r3", guard=GuardConfig(action="off")
    )
    (mini,) = old.prepare(packed(rollouts), rollouts, 1)
    ((seen,),) = learner.routed
    assert sorted(set(seen.expert_ids[:, 0, 0].tolist())) == [1, 2]  # both rollouts' own
    assert [b.routing for b in mini.batches()] == [None]  # the batch's traces stay with the rollouts
    routed = old.with_routes(mini, rollouts)
    assert [len(b.routing) for b in routed.batches()] == [10]


def test_no_replay_attaches_nothing_even_where_the_engine_recorded():
    rollouts = two(routed=True)
    (mini,) = packed(rollouts)
    assert make(BookLearner()).with_routes(mini, rollouts) is mini


def test_a_kl_term_takes_one_more_pass_of_the_reference():
    learner, rollouts = BookLearner(-3.0), two()
    (mini,) = make(learner, name="grpo", kl_coef=0.1).prepare(packed(rollouts), rollouts, 1)
    assert learner.calls == [("logprobs", {"record_routing": False, "reference": True})]
    (batch,) = mini.batches()
    assert torch.equal(batch.ref_logprobs, torch.where(batch.loss_mask, -3.0, 0.0))
    assert batch.old_logprobs is None


@pytest.mark.parametrize("action", ["recompute", "recentre"])
def test_the_guard_can_ask_for_recomputation(action):
    learner, rollouts = BookLearner(-2.5), two()
    old = make(learner, guard=GuardConfig(action=action))
    old.guard.decision = GuardDecision(action, 0.0, True, "an offset of many widths")
    (mini,) = old.prepare(packed(rollouts), rollouts, 1)
    asked = action == "recompute"
    assert old.recomputed == asked
    assert [b.old_logprobs is not None for b in mini.batches()] == [asked]


def test_a_step_after_the_guard_rested_uses_the_engines_again():
    learner, rollouts = BookLearner(-2.5), two()
    old = make(learner, guard=GuardConfig(action="recompute"))
    old.guard.decision = GuardDecision("recompute", 0.0, True, "")
    old.prepare(packed(rollouts), rollouts, 1)
    old.guard.decision = GuardDecision("none", 0.0, True, "")
    old.prepare(packed(rollouts), rollouts, 2)
    assert old.metrics() == {"old_logprobs/recomputed": 0.0}


def test_before_the_first_step_nothing_is_recomputed():
    assert make(BookLearner()).metrics() == {"old_logprobs/recomputed": 0.0}


def test_every_step_begins_with_the_guards_own_measurement():
    """The engine says -1, the learner -1.01: measured on all sequences, before anything else is decided."""
    learner, rollouts = BookLearner(-1.01), two()
    old = make(learner, guard=GuardConfig(action="recompute", estimator="subset", subset_fraction=1.0))
    (mini,) = old.prepare(packed(rollouts), rollouts, 1)
    assert old.guard.metrics()["guard/active"] == 1.0
    assert old.recomputed
    assert [b.old_logprobs is not None for b in mini.batches()] == [True]
    assert len(learner.calls) == 2  # the subset, and the recomputation that it asked for
