"""Live flip rates of a step, on routes that are known by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gspo_dist.config import FlipsConfig
from gspo_dist.routing.flips import sample_sequences
from gspo_dist.trainer.flip_meter import FlipMeter
from tests.unit.trainer.small import BookLearner, packed, rollout, trace


def meter(
    learner: BookLearner,
    *,
    every: int = 1,
    sequences: int = 8,
    layers: int = 2,
    replicas: int = 1,
    budget: int = 64,
):
    return FlipMeter(FlipsConfig(every=every, sequences=sequences), learner, 0, layers, replicas, budget)


class Moving(BookLearner):
    """Routes every token to experts e and e + 1, where e moves with the policy version: 3, then 4, then 6."""

    def __init__(self) -> None:
        super().__init__(route=lambda b: trace(b.num_tokens, {3: 3, 4: 4, 5: 6}[self.policy_version]))


def measured(
    m: FlipMeter, learner: BookLearner, rollouts, *, step: int = 1, minis: int = 2, replicas: int = 1
):
    m.begin(step, packed(rollouts, replicas=replicas), rollouts)
    for index in range(minis):
        learner.optim_step()
        m.after_mini_batch(index)
    m.finish_step()
    return m.metrics()


def test_flips_against_the_policy_before_the_step():
    """{3, 4} against {4, 5}: half of the experts; against {6, 7}: all. Every router and token differs."""
    learner = Moving()
    out = measured(meter(learner), learner, [rollout(0), rollout(1)])
    assert out["routing/update/flip_fraction/mini_batch_0"] == 0.5
    assert out["routing/update/flip_fraction/mini_batch_1"] == 1.0
    assert out["routing/update/flip_fraction"] == 1.0  # the whole step's
    assert out["routing/update/router_flip_fraction"] == out["routing/update/token_flip_fraction"] == 1.0
    assert out["routing/update/flip_fraction/layer_00"] == 1.0
    assert not any(name.startswith("routing/engine") for name in out)  # the engine recorded nothing


def test_flips_against_the_engine_before_the_update():
    learner = Moving()
    rollouts = [rollout(0, routing=trace(5, 3)), rollout(1, routing=trace(5, 4))]  # the learner says 3
    out = measured(meter(learner), learner, rollouts)
    assert out["routing/engine/flip_fraction"] == 0.25
    assert out["routing/engine/token_flip_fraction"] == 0.5


def test_completions_of_older_policies_say_nothing_of_the_engine():
    """The learner, at version 3, says expert 3. What versions 2 and 1 used differs: the policy has moved."""
    learner = Moving()
    mixed = rollout(2, routing=trace(5, 7))
    versions = np.array([2, 3, 3], np.int32)  # it went on over a publication: only its end is fresh
    mixed = replace(mixed, completion=replace(mixed.completion, policy_versions=versions))
    rollouts = [rollout(0, routing=trace(5, 3)), rollout(1, routing=trace(5, 7), version=1), mixed]
    out = measured(meter(learner), learner, rollouts)
    assert out["routing/engine/flip_fraction"] == 0.0
    fresh = measured(meter(learner := Moving()), learner, [rollout(0, routing=trace(5, 4))])
    assert fresh["routing/engine/flip_fraction"] == 0.5
    out = measured(meter(learner := Moving()), learner, rollouts[1:])
    assert not any(name.startswith("routing/engine") for name in out)
    assert out["routing/update/flip_fraction/mini_batch_0"] == 0.5  # the update's are measured all the same


def test_one_rollout_without_a_trace_leaves_the_engine_out():
    learner = Moving()
    out = measured(meter(learner), learner, [rollout(0, routing=trace(5, 3)), rollout(1)])
    assert not any(name.startswith("routing/engine") for name in out)


def test_masked_copies_of_idle_replicas_do_not_count():
    learner = Moving()
    rollouts = [rollout(0, routing=trace(5, 4)), rollout(1, routing=trace(5, 3))]
    out = measured(meter(learner, sequences=1, replicas=2), learner, rollouts, replicas=2)
    assert out["routing/engine/flip_fraction"] in (0.0, 0.5)  # of the one that was sampled, whole
    assert learner.calls[0] == ("logprobs", {"record_routing": True, "reference": False})


def test_the_sample_runs_in_passes_within_the_budget_and_counts_the_same():
    """Four rollouts of 5 tokens, 10 in a pass: two passes, and the rates of one."""
    rates = []
    for budget, passes in ((64, 1), (10, 2)):
        learner = Moving()
        rollouts = [rollout(i, routing=trace(5, 3 + i % 2)) for i in range(4)]
        out = measured(meter(learner, budget=budget), learner, rollouts)
        assert [len(routed) for routed in learner.routed] == [passes] * 3
        rates.append(out)
    assert rates[0] == rates[1]
    assert rates[0]["routing/engine/flip_fraction"] == 0.25


def test_the_first_step_and_every_nth_after_it_are_measured():
    m = meter(BookLearner(), every=3)
    assert [step for step in range(1, 9) if m.due(step)] == [1, 4, 7]
    assert not any(meter(BookLearner(), every=0).due(step) for step in range(1, 9))
    assert not any(meter(BookLearner(), layers=0).due(step) for step in range(1, 9))


def test_a_step_that_is_not_due_runs_nothing_and_reports_nothing():
    learner = Moving()
    m = meter(learner, every=2)
    assert measured(m, learner, [rollout(0), rollout(1)], minis=1) != {}
    learner.calls.clear()
    assert measured(m, learner, [rollout(0), rollout(1)], step=2, minis=1) == {}
    assert learner.calls == []


def test_the_sample_carries_no_routes_so_that_the_learner_routes_freely():
    learner = Moving()
    rollouts = [rollout(0, routing=trace(5, 1)), rollout(1, routing=trace(5, 1))]
    m = meter(learner)
    m.begin(1, [mini.with_traces(rollouts) for mini in packed(rollouts)], rollouts)
    assert learner.routed == [[None]]


def test_the_history_holds_each_measured_step_once_and_survives_a_resume(tmp_path):
    learner = Moving()
    m = meter(learner)
    measured(m, learner, [rollout(0, routing=trace(5, 4)), rollout(1, routing=trace(5, 4))], minis=2)
    assert m.history["update"].steps.tolist() == [1]
    assert m.history["update"].rates.tolist() == [[1.0, 1.0]]  # after the last mini-batch
    assert m.history["engine"].rates.tolist() == [[0.5, 0.5]]
    learner.policy_version = 3
    measured(m, learner, [rollout(0), rollout(1)], step=2, minis=1)
    m.save(tmp_path)
    again = meter(learner)
    again.restore(tmp_path, step=1)  # the checkpoint is of step 1: step 2 will be measured again
    assert again.history["update"].steps.tolist() == [1]
    assert again.history["engine"].rates.tolist() == [[0.5, 0.5]]
    assert [p.name for p in again.draw(tmp_path)] == ["flips_engine.png", "flips_update.png"]
    assert (tmp_path / "flips_update.png").stat().st_size > 1000


def test_a_step_cut_short_leaves_no_mark():
    learner = Moving()
    m = meter(learner)
    m.begin(1, packed([rollout(0)]), [rollout(0)])
    m.finish_step()
    assert m.history["update"].steps.tolist() == []


def test_asking_for_metrics_changes_nothing():
    learner = Moving()
    m = meter(learner)
    out = measured(m, learner, [rollout(0)])
    out["routing/update/flip_fraction"] = 99.0
    assert m.metrics()["routing/update/flip_fraction"] == 1.0
    assert m.history["update"].steps.tolist() == [1]


@pytest.mark.parametrize("folder", ["nothing-here"])
def test_a_resume_without_a_saved_history_starts_empty(tmp_path, folder):
    m = meter(BookLearner())
    m.restore(tmp_path / folder, step=5)
    assert len(m.history["update"]) == 0
    assert m.draw(tmp_path) == []


def test_the_sample_of_a_step_is_drawn_by_seed_and_index():
    learner = Moving()
    seen: list[int] = []
    learner.route = lambda b: (seen.extend(b.rollout_index.tolist()), trace(b.num_tokens, 3))[1]
    rollouts = [rollout(i) for i in range(20)]
    m = meter(learner, sequences=4)
    m.begin(6, packed(rollouts), rollouts)
    assert sorted(seen) == sample_sequences(range(20), 4, seed=0, step=5)


def test_a_drawing_comes_with_its_numbers(tmp_path):
    learner = Moving()
    m = meter(learner)
    measured(m, learner, [rollout(0)], minis=1)
    m.draw(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flips_update.npz", "flips_update.png"]
