"""The guard over engine log-probs: what it measures, what it decides, what a mini-batch's loss becomes."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from gspo_dist.config import GuardConfig, ObjectiveConfig
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.objective import get_objective
from gspo_dist.objectives.offset import batch_offset
from gspo_dist.trainer.guard import OWN_MEAN_FROM, SUBSET_SEED_STRIDE, OffsetGuard
from tests.unit.trainer.small import BookLearner, packed, rollout, trace

CLIP_LOW = 3e-4  # GSPO's: an offset of -1.5e-3 is -1.5e-3 / -log(1 - 3e-4) = -4.99925 widths


def guard(learner=None, objective: str = "gspo", old: str = "rollout", **knobs) -> OffsetGuard:
    config = ObjectiveConfig(name=objective, old_logprobs=old, guard=GuardConfig(**knobs))
    return OffsetGuard(config, get_objective(objective), learner or BookLearner(), seed=5, token_budget=64)


def measured(mean: float, square: float | None = None, sequences: int = 4) -> dict[str, Stat]:
    """Merged statistics of a first mini-batch."""

    def stat(value: float) -> Stat:
        return Stat(
            torch.tensor(value * sequences, dtype=torch.float64), torch.tensor(float(sequences)), "mean"
        )

    return {
        "mismatch/log_ratio_mean": stat(mean),
        "mismatch/log_ratio_square": stat(mean * mean if square is None else square),
        "objective/sequences": Stat(torch.tensor(sequences).double(), torch.tensor(1.0).double(), "sum"),
    }


def spec_of(g: OffsetGuard, index: int, *, sequences: int = 4, recomputed: bool = False):
    (mini,) = packed([rollout(i, group=i, tokens=(5,), prompt=(1,)) for i in range(sequences)])
    return g.loss_spec(mini, index, recomputed=recomputed)


def test_what_recentring_takes_out_of_later_mini_batches_is_what_the_first_one_measured():
    g = guard(action="recentre")
    assert spec_of(g, 1).offset == 0.0  # nothing measured yet
    g.observe(measured(-1.5e-3), 0)
    assert spec_of(g, 1).offset == pytest.approx(-1.5e-3, rel=1e-12)
    assert not spec_of(g, 1).own_mean


def test_a_guard_that_has_measured_nothing_does_nothing():
    assert guard(action="recentre").state_dict()["decision"] == {
        "action": "none",
        "offset": 0.0,
        "changed": False,
        "reason": "no measurement yet",
    }


@pytest.mark.parametrize(("sequences", "own"), [(OWN_MEAN_FROM - 1, False), (OWN_MEAN_FROM, True)])
def test_the_first_mini_batch_takes_its_own_mean_where_it_has_sequences_enough(sequences, own):
    g = guard(action="recentre", estimator="batch")
    g.observe(measured(-1.5e-3), 0)
    spec = spec_of(g, 0, sequences=sequences)
    assert spec.own_mean == own
    assert spec.offset == pytest.approx(0.0 if own else -1.5e-3, rel=1e-12)


def test_the_running_mean_recentres_the_first_mini_batch_too():
    g = guard(action="recentre", estimator="ema")
    g.observe(measured(-1.5e-3), 0)
    assert spec_of(g, 0, sequences=OWN_MEAN_FROM).offset == pytest.approx(-1.5e-3, rel=1e-12)


def test_recomputed_log_probs_have_no_offset_to_take_out():
    g = guard(action="recentre")
    g.observe(measured(-1.5e-3), 0)
    spec = spec_of(g, 0, sequences=OWN_MEAN_FROM, recomputed=True)
    assert (spec.offset, spec.own_mean) == (0.0, False)


def test_mismatch_is_measured_in_the_first_mini_batch_and_everywhere_when_recomputed():
    g = guard()
    assert [spec_of(g, i).measure_mismatch for i in (0, 1)] == [True, False]
    assert [spec_of(g, i, recomputed=True).measure_mismatch for i in (0, 1)] == [True, True]


def test_a_later_mini_batch_is_learning_and_measures_nothing():
    g = guard(action="recentre")
    g.observe(measured(-1.5e-3), 1)
    assert g.metrics() == {}
    assert spec_of(g, 1).offset == 0.0


def test_the_metrics_are_the_measurement_in_nats_in_clip_widths_and_its_error():
    g = guard(action="warn")
    mean, square, n = -1.5e-3, 1.5e-3**2 + 1e-8, 4
    g.observe(measured(mean, square, n), 0)
    out = g.metrics()
    assert out["guard/offset"] == pytest.approx(mean, rel=1e-12)
    assert out["guard/offset_clip_widths"] == pytest.approx(-4.99925, rel=1e-6)
    spread = (1e-8 * n / (n - 1)) ** 0.5
    assert out["guard/offset_standard_error"] == pytest.approx(spread / n**0.5, rel=1e-6)
    assert out["guard/active"] == 1.0
    assert out["guard/applied_offset"] == 0.0  # it only warns
    assert guard(action="recentre").metrics() == {}


def test_recentring_reports_the_offset_that_it_applies():
    g = guard(action="recentre")
    g.observe(measured(-1.5e-3), 0)
    assert g.metrics()["guard/applied_offset"] == pytest.approx(-1.5e-3, rel=1e-12)


def test_a_small_offset_leaves_the_guard_at_rest():
    g = guard(action="recompute")
    g.observe(measured(-1e-4), 0)
    assert not g.wants_recompute
    assert g.metrics()["guard/active"] == 0.0


def test_it_asks_for_recomputation_until_the_offset_is_small_again(caplog):
    g = guard(action="recompute")
    with caplog.at_level(logging.WARNING):
        g.observe(measured(-1.5e-3), 0)
    assert g.wants_recompute
    assert "log-prob guard acts (recompute)" in caplog.text
    g.observe(measured(-1e-5), 0)
    assert not g.wants_recompute


def test_an_objective_without_a_clip_reports_the_offset_and_decides_nothing():
    g = guard(objective="reinforce", action="warn")
    g.observe(measured(-1.5e-3), 0)
    assert set(g.metrics()) == {"guard/offset", "guard/offset_standard_error", "guard/from_probe"}


def test_the_subset_is_measured_exactly_before_the_update():
    """Learner -1.002 and -1.004 against the engine's -1: the mean over both sequences is -0.003 nats."""
    level = {0: -1.002, 1: -1.004}

    def logprob(batch):
        return torch.tensor([level[int(i)] for i in batch.rollout_index])[batch.sequence_ids()].double()

    g = guard(BookLearner(logprob), action="recentre", estimator="subset", subset_fraction=1.0)
    rollouts = [rollout(0, tokens=(5,)), rollout(1, tokens=(6, 7, 8))]
    g.begin_step(packed(rollouts), rollouts, 1)
    assert spec_of(g, 0).offset == pytest.approx(-0.003, abs=1e-6)  # sequences weigh equally, not tokens
    assert g.metrics()["guard/applied_offset"] == pytest.approx(-0.003, abs=1e-6)
    assert "-0.003 +- 0 is" in g.decision.reason  # all were measured: nothing is left to chance
    g.observe(measured(-1.5e-3), 0)  # reported, but the subset decides
    assert g.metrics()["guard/offset"] == pytest.approx(-1.5e-3, rel=1e-12)
    assert spec_of(g, 1).offset == pytest.approx(-0.003, abs=1e-6)


def test_the_subset_is_measured_within_the_token_budget():
    """Six sequences of 5 tokens, at most 64 in a pass of the update but 10 in one of this learner's."""
    learner = BookLearner(-1.002)
    g = guard(learner, action="recentre", estimator="subset", subset_fraction=1.0)
    g.token_budget = 10
    rollouts = [rollout(i) for i in range(6)]
    g.begin_step(packed(rollouts), rollouts, 1)
    assert learner.tokens == [[10, 10, 10]]
    assert spec_of(g, 0).offset == pytest.approx(-0.002, abs=1e-6)


def test_fillers_of_idle_replicas_are_not_in_the_subset():
    g = guard(BookLearner(-1.002), action="recentre", estimator="subset", subset_fraction=1.0)
    rollouts = [rollout(i, group=i) for i in range(2)]
    g.begin_step(packed(rollouts, replicas=2), rollouts, 1)
    assert spec_of(g, 0).offset == pytest.approx(-0.002, abs=1e-6)


def test_the_subset_replays_the_engines_routes_under_r3():
    learner = BookLearner(-1.002)
    config = ObjectiveConfig(
        name="gspo",
        routing_replay="r3",
        guard=GuardConfig(action="recentre", estimator="subset", subset_fraction=1.0),
    )
    g = OffsetGuard(config, get_objective("gspo"), learner, seed=5, token_budget=64)
    rollouts = [rollout(0, routing=trace(5, 1)), rollout(1, routing=trace(5, 3))]
    g.begin_step(packed(rollouts), rollouts, 1)
    (routed,) = learner.routed
    assert sum(len(t) for t in routed) == 10


def test_the_subset_of_a_step_depends_on_seed_and_step():
    seen: list[list[int]] = []

    def logprob(batch):
        seen.append(sorted(batch.rollout_index.tolist()))
        return torch.full((batch.num_tokens,), -1.0)

    rollouts = [rollout(i) for i in range(12)]
    g = guard(BookLearner(logprob), action="recentre", estimator="subset", subset_fraction=0.25)
    for step in (1, 1, 2):
        g.begin_step(packed(rollouts), rollouts, step)
    assert seen[0] == seen[1] != seen[2]
    import random

    assert seen[0] == sorted(random.Random(5 * SUBSET_SEED_STRIDE).sample(range(12), 3))


@pytest.mark.parametrize(
    ("old", "knobs"),
    [
        ("recompute", {"action": "warn", "estimator": "subset"}),
        ("rollout", {"action": "warn", "estimator": "subset"}),
        ("rollout", {"action": "recentre", "estimator": "batch"}),
    ],
)
def test_no_pass_runs_where_the_subset_is_not_asked_for(old, knobs):
    learner = BookLearner()
    rollouts = [rollout(0), rollout(1)]
    guard(learner, old=old, **knobs).begin_step(packed(rollouts), rollouts, 1)
    assert learner.calls == []


def test_a_new_step_forgets_the_last_measurement_but_not_the_decision():
    g = guard(action="recentre")
    rollouts = [rollout(0), rollout(1)]
    g.observe(measured(-1.5e-3), 0)
    g.begin_step(packed(rollouts), rollouts, 2)
    assert g.metrics() == {}
    assert spec_of(g, 1).offset == pytest.approx(-1.5e-3, rel=1e-12)


def test_a_resumed_guard_decides_as_if_it_had_not_stopped():
    a = guard(action="recentre", estimator="ema")
    for offset in (-1.5e-3, -2.5e-3):
        a.observe(measured(offset), 0)
    b = guard(action="recentre", estimator="ema")
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert spec_of(b, 1).offset == spec_of(a, 1).offset != 0.0
    for g in (a, b):
        g.observe(measured(-0.9e-3), 0)
    assert b.metrics() == a.metrics()
    assert b.state_dict() == a.state_dict()


def stale(*versions: int):
    """Rollouts of three tokens, each of one version: learner -1.002 against the engine's -1."""
    return [rollout(i, version=version) for i, version in enumerate(versions)]


def test_a_batch_without_a_fresh_token_is_judged_by_the_probe():
    """The statistics of older tokens say that the policy moved; the probe says 4e-4 nats, 1.3 clip widths."""
    g = guard(action="warn")
    probe = batch_offset([-3.9e-4, -4.1e-4])
    g.observe({"staleness/log_ratio_mean": measured(-0.03)["mismatch/log_ratio_mean"]}, 0, probe)
    out = g.metrics()
    assert out["guard/offset"] == pytest.approx(-4e-4, rel=1e-9)
    assert out["guard/offset_clip_widths"] == pytest.approx(-4e-4 / 3.00045e-4, rel=1e-5)
    assert (out["guard/from_probe"], out["guard/active"]) == (1.0, 1.0)


def test_fresh_tokens_come_before_the_probe():
    g = guard(action="warn")
    g.observe({}, 0, batch_offset([0.1, 0.1]))
    assert g.metrics()["guard/from_probe"] == 1.0
    g.begin_step([], [], 2)
    g.observe(measured(-1.5e-3), 0, batch_offset([0.1, 0.1]))
    assert g.metrics()["guard/offset"] == pytest.approx(-1.5e-3, rel=1e-12)
    assert g.metrics()["guard/from_probe"] == 0.0


def test_remedies_for_older_tokens_get_the_offset_of_fresh_ones_and_no_probes(monkeypatch):
    """A probe's sequences are older than the weights, so what they say is no offset of fresh tokens."""
    g = guard(action="warn")
    got = []
    monkeypatch.setattr(g.remedies, "observe", lambda stats, fresh: got.append(fresh))
    g.observe(measured(-1.5e-3), 0)
    g.observe({}, 0, batch_offset([0.1, 0.1]))
    spec_of(g, 0, recomputed=True)
    g.observe(measured(-1.5e-3), 0)
    assert got == [pytest.approx(-1.5e-3, rel=1e-12), None]


@pytest.mark.parametrize("exact", [False, True])
def test_a_contract_of_equality_is_passed_on_to_every_loss(exact):
    objective = get_objective("gspo")
    g = OffsetGuard(ObjectiveConfig(), objective, BookLearner(), seed=5, token_budget=64, exact=exact)
    assert [spec_of(g, i).exact for i in (0, 1)] == [exact, exact]
    assert not spec_of(guard(), 0).exact
    assert g.objective is objective  # by which old log-probs are asked for what it reads


def test_a_state_is_taken_up_by_an_objective_that_decides_otherwise():
    """With a clip there is an estimate to keep, without one there is none."""
    clipped, plain = guard(action="warn"), guard(objective="reinforce", action="warn")
    clipped.observe(measured(-1.5e-3), 0)
    one, other = clipped.state_dict(), plain.state_dict()
    plain.load_state_dict(one)
    clipped.load_state_dict(other)
    assert (plain.decision.reason, clipped.decision.reason) == (
        one["decision"]["reason"],
        "no measurement yet",
    )
    assert clipped.state_dict()["guard"] == one["guard"]


def test_with_neither_the_guard_keeps_its_decision_and_reports_nothing():
    g = guard(action="recentre")
    g.observe(measured(-1.5e-3), 0)
    g.begin_step([], [], 2)
    g.observe({}, 0)
    assert g.metrics() == {}
    assert spec_of(g, 1).offset == pytest.approx(-1.5e-3, rel=1e-12)


def test_the_error_of_a_measurement_counts_the_sequences_that_were_measured():
    """Two fresh sequences in a mini-batch of four: a spread of 2e-4 is an error of 2e-4 / sqrt 2."""
    g = guard(action="warn")
    stats = measured(-1.5e-3, 1.5e-3**2 + 2e-8, 2)
    stats["objective/sequences"] = measured(0.0)["objective/sequences"]
    g.observe(stats, 0)
    assert g.metrics()["guard/offset_standard_error"] == pytest.approx(2e-4 / 2**0.5, rel=1e-5)


def test_the_own_mean_is_taken_only_of_fresh_mini_batches():
    """Older tokens would put the policy's own movement into it."""
    g = guard(action="recentre", estimator="batch")
    g.observe(measured(-1.5e-3), 0)
    g.policy_version = 3
    many = [rollout(i, group=i, tokens=(5,), prompt=(1,)) for i in range(OWN_MEAN_FROM)]
    old = [*many[1:], rollout(0, group=0, tokens=(5,), prompt=(1,), version=1)]
    for rollouts, own in ((many, True), (old, False)):
        (mini,) = packed(rollouts)
        spec = g.loss_spec(mini, 0, recomputed=False)
        assert (spec.own_mean, spec.policy_version) == (own, 3)
        assert spec.offset == pytest.approx(0.0 if own else -1.5e-3, rel=1e-12)


def test_the_subset_is_drawn_from_fresh_sequences():
    """The learner, at version 3, says -1.002 of what version 3 sampled and -1.5 of what is older."""

    def logprob(batch):
        return torch.where(batch.policy_versions == 3, -1.002, -1.5)

    g = guard(BookLearner(logprob), action="recentre", estimator="subset", subset_fraction=1.0)
    rollouts = stale(3, 1, 3, 0)
    g.begin_step(packed(rollouts), rollouts, 1)
    assert g.decision.offset == pytest.approx(-0.002, rel=1e-4)


def test_a_subset_of_nothing_leaves_the_decision_to_the_probe():
    g = guard(BookLearner(-1.5), action="recentre", estimator="subset", subset_fraction=1.0)
    rollouts = stale(1, 0)
    g.begin_step(packed(rollouts), rollouts, 1)
    assert not g.decided
    g.observe({}, 0, batch_offset([-1e-3, -1e-3]))
    assert g.decision.offset == pytest.approx(-1e-3, rel=1e-12)
