"""m2po's cut over a mini-batch: from all of its replicas and micro-batches, where the policy has moved."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gspo_dist.cli.compose import run_config
from gspo_dist.learners.loss import LossSpec, micro_batch_loss, trained_index
from gspo_dist.metrics.stat import merge_stats
from gspo_dist.objectives import Denominators, get_objective
from gspo_dist.packing import pack
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.loop import learn
from gspo_dist.trainer.old_logprobs import OldLogprobs
from gspo_dist.trainer.whole_batch import with_second_moment_cut
from tests.unit.trainer.small import BookLearner, rollout, trace


def mini_of(replicas, token_budget):
    rollouts = [rollout(i, tokens=(i + 1,) * (i + 2), reward=float(i % 2)) for i in range(6)]
    advantages = [1.0 if i % 2 else -1.0 for i in range(6)]
    (mini,) = pack(
        rollouts,
        advantages,
        replicas=replicas,
        token_budget=token_budget,
        mini_batches=1,
        max_completion_length=8,
        seed=(0, 0),
    )
    return mini


def moved(batch):
    """A learner that has moved a token by 0.07 for its id, up for odd ones, as A asks; the engine said -1."""
    ids = batch.token_ids
    return -1.0 + 0.07 * ids * torch.where(ids % 2 == 0, 1.0, -1.0)


def spec_of(mini, name="m2po"):
    return LossSpec(get_objective(name), mini.denominators)


@pytest.mark.parametrize(("replicas", "token_budget"), [(1, 64), (1, 10), (2, 20), (3, 12)])
def test_the_cut_is_that_of_the_whole_mini_batch_whatever_its_layout(replicas, token_budget):
    """Ids 1 to 6 have 2 to 7 tokens and the squares (.07 i)^2; A is +1 for the even ids, which went up.

    The mean over ids 1 to 3 is .0272, over 1 to 4 .0455. The five equal squares of id 4 go together, so the
    cut lies between .0441 and .0784.
    """
    mini = mini_of(replicas, token_budget)
    learner = BookLearner(moved)
    got = with_second_moment_cut(spec_of(mini), mini, learner, unmoved=False)
    assert got.second_moment_cut == pytest.approx((0.0441 + 0.0784) / 2, rel=1e-5)
    assert len(learner.calls) == 1
    dropped = 0.0
    for batch in mini.batches():
        index = trained_index(batch)
        if len(index):
            loss, stats = micro_batch_loss(moved(batch)[index], torch.zeros(len(index)), batch, got)
            dropped += float(stats["objective/clip_fraction"].value)
            assert math.isfinite(loss)
    assert dropped == 18  # ids 4, 5 and 6: 5, 6 and 7 tokens


def test_nothing_runs_where_the_policy_has_not_moved_or_nobody_asks():
    mini, learner = mini_of(1, 64), BookLearner(moved)
    assert with_second_moment_cut(spec_of(mini), mini, learner, unmoved=True).second_moment_cut == math.inf
    spec = spec_of(mini, "grpo")
    assert with_second_moment_cut(spec, mini, learner, unmoved=False) is spec
    assert learner.calls == []


def test_recomputed_log_probs_are_what_the_policy_has_moved_from():
    mini, learner = mini_of(1, 64), BookLearner(moved)
    mini = mini.with_outputs(BookLearner(moved).logprobs(mini.micro_batches))
    assert with_second_moment_cut(spec_of(mini), mini, learner, unmoved=False).second_moment_cut == math.inf


class Learning(BookLearner):
    """Moves between the mini-batches, and keeps the loss of each."""

    def __init__(self):
        super().__init__(lambda batch: -1.0 + (moved(batch) + 1.0) * (1 + 3 * (self.policy_version - 3)))
        self.specs = []

    def forward_backward(self, mini, spec):
        self.specs.append(spec)
        found = []
        for batch in mini.batches():
            index = trained_index(batch)
            found.append(
                micro_batch_loss(self.logprob(batch)[index], torch.zeros(len(index)), batch, spec)[1]
            )
        return merge_stats(found)


@pytest.mark.parametrize(("old_logprobs", "passes"), [("rollout", 2), ("recompute", 2 + 1)])
def test_a_step_finds_the_cut_of_every_mini_batch_after_the_policy_has_moved(old_logprobs, passes):
    """On engine log-probs that is all of them. Recomputed ones are the policy's own before the first."""
    config = run_config(
        [
            "objective=m2po",
            f"objective.old_logprobs={old_logprobs}",
            "objective.routing_replay=r3",
            "mini_batches=2",
            "learner.world_size=1",
            "learner.token_budget=9216",
        ]
    )
    learner, objective = Learning(), get_objective("m2po")
    guard = OffsetGuard(config.objective, objective, learner, seed=0, token_budget=64)
    nothing = SimpleNamespace(
        begin=lambda *given: None,
        after_mini_batch=lambda index: None,
        finish_step=lambda: None,
        metrics=dict,
        beside_learner=contextlib.nullcontext,
        episode_rows=lambda *given: [],
        probed_offset=None,
    )
    run = SimpleNamespace(
        config=config,
        learner=learner,
        clock=StepClock(),
        objective=objective,
        old_logprobs=OldLogprobs(config.objective, learner, guard),
        guard=guard,
        flips=nothing,
        collector=nothing,
        suites=nothing,
        publisher=nothing,
    )
    rollouts = [
        rollout(i, group=i // 2, tokens=(i + 1,) * (i + 2), reward=float(i % 2), routing=trace(i + 4, 1))
        for i in range(6)
    ]
    learn(run, rollouts, 1)
    assert len(learner.calls) == passes
    assert all(trace is not None for traces in learner.routed for trace in traces)
    cuts = [spec.second_moment_cut for spec in learner.specs]
    assert [math.isinf(cut) for cut in cuts] == [old_logprobs == "recompute", False]


def test_a_loss_without_the_cut_says_who_finds_it():
    mini = mini_of(1, 64)
    (batch,) = mini.batches()
    n = len(trained_index(batch))
    with pytest.raises(ValueError, match=r"m2po masks over the whole mini-batch.*trainer/whole_batch\.py"):
        micro_batch_loss(torch.full((n,), -1.0), torch.zeros(n), batch, spec_of(mini))
    whole = replace(spec_of(mini), denominators=Denominators(6, 27, 8), second_moment_cut=0.1)
    assert math.isfinite(micro_batch_loss(torch.full((n,), -1.0), torch.zeros(n), batch, whole)[0])
