"""What a step does about the age of its tokens: what was measured, and what a loss takes of it."""

from __future__ import annotations

import json

import pytest
import torch

from gspo_dist.config import ObjectiveConfig
from gspo_dist.config.objective import CorrectionConfig, StalenessConfig
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.objective import get_objective
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.remedies import StalenessRemedies
from tests.unit.trainer.small import BookLearner, packed, rollout


def mean(value: float, weight: float = 8.0) -> Stat:
    return Stat(*torch.tensor([value * weight, weight], dtype=torch.float64), "mean")


def first(mean_: float = -6e-4, square: float = 1e-6, **lags: float) -> dict[str, Stat]:
    """Statistics of a first mini-batch: the moments of log s, and the mean of each lag."""
    stats = {
        "objective/sequence_log_ratio_mean": mean(mean_),
        "objective/sequence_log_ratio_square": mean(square),
    }
    return stats | {f"staleness/log_ratio_mean/{lag}": mean(value) for lag, value in lags.items()}


def config(old="rollout", correction="none", **knobs) -> ObjectiveConfig:
    return ObjectiveConfig(
        name="gspo",
        old_logprobs=old,
        correction=CorrectionConfig(correction),
        staleness=StalenessConfig(**knobs),
    )


def remedies(**knobs) -> StalenessRemedies:
    return StalenessRemedies(config(**knobs), get_objective("gspo"))


def test_nothing_is_done_unless_it_is_asked_for():
    r = remedies()
    r.observe(first(lag_4=-0.01), 0.001)
    assert r.lag_offsets(0, recomputed=False) is None
    assert r.widened(recomputed=False) is r.objective
    assert r.metrics(recomputed=False) == {}


def test_a_first_mini_batch_prefers_its_own_means_and_later_ones_take_what_it_measured():
    r = remedies(recentre=True)
    r.observe(first(lag_4=-0.01, lag_8=-0.03), 0.001)
    for index, own in ((0, True), (1, False), (2, False)):
        offsets = r.lag_offsets(index, recomputed=False)
        assert offsets.known == pytest.approx({0: 0.001, 4: -0.01, 8: -0.03}, rel=1e-12)
        assert offsets.own == own
    assert r.lag_offsets(0, recomputed=True) is None  # the guard had the log-probs recomputed
    r.observe(first(lag_4=-0.02), None)  # no fresh token, and nothing of lag 8: what was known of them is old
    assert r.lag_offsets(1, recomputed=False).known == pytest.approx({4: -0.02}, rel=1e-12)


def test_the_clip_follows_the_size_of_the_log_ratio():
    """Root mean square 1e-3, of which 2 are 2e-3: 6.67 times 3e-4. Both sides grow alike."""
    r = remedies(clip_spreads=2.0)
    assert r.clip_scale == 1.0  # nothing measured yet
    r.observe(first(square=1e-6), None)
    assert r.clip_scale == pytest.approx(2e-3 / 3e-4, rel=1e-9)
    clip = r.widened(recomputed=False).clip
    assert (clip.low, clip.high) == pytest.approx((2e-3, 2e-3 * 4 / 3), rel=1e-9)
    assert r.widened(recomputed=True) is r.objective
    assert r.metrics(recomputed=False)["staleness/clip_scale"] == pytest.approx(2e-3 / 3e-4, rel=1e-9)
    assert r.metrics(recomputed=True)["staleness/clip_scale"] == 1.0


@pytest.mark.parametrize(("square", "scale"), [(1e-10, 1.0), (1e-2, 0.01 / 4e-4)])
def test_the_clip_is_never_narrower_than_its_own_size_and_never_wider_than_the_bound(square, scale):
    r = remedies(clip_spreads=2.0)
    r.observe(first(square=square), None)
    assert r.clip_scale == pytest.approx(scale, rel=1e-12)


def test_where_offsets_are_taken_out_the_clip_follows_what_is_left():
    """Mean square 1e-6, mean -6e-4: the standard deviation is 8e-4."""
    r = remedies(clip_spreads=1.0, recentre=True)
    r.observe(first(-6e-4, 1e-6, lag_4=-6e-4), None)
    assert r.size == pytest.approx(8e-4, rel=1e-9)


def test_a_checkpoint_keeps_what_was_measured():
    r = remedies(recentre=True, clip_spreads=1.0)
    r.observe(first(lag_4=-0.01), 0.001)
    again = remedies(recentre=True, clip_spreads=1.0)
    again.load_state_dict(json.loads(json.dumps(r.state_dict())))
    assert again.lag_offsets(1, recomputed=False) == r.lag_offsets(1, recomputed=False)
    assert again.clip_scale == r.clip_scale > 1.0


# --- through the guard, which makes the losses of a step ---


def begun(c: ObjectiveConfig, version: int = 1) -> tuple[OffsetGuard, list]:
    """A guard at the start of a step, whose learner is at version 3."""
    g = OffsetGuard(c, get_objective("gspo"), BookLearner(), seed=5, token_budget=64)
    rollouts = [rollout(i, version=version) for i in range(2)]
    minis = packed(rollouts)
    g.begin_step(minis, rollouts, 1)
    return g, minis


def test_the_loss_of_a_mini_batch_gets_offsets_clip_and_version():
    g, (mini,) = begun(config(recentre=True, clip_spreads=2.0))
    g.observe(first(lag_2=-0.01), 0)
    spec = g.loss_spec(mini, 1, recomputed=False)
    assert spec.lag_offsets.known == pytest.approx({2: -0.01}, rel=1e-12)
    assert spec.objective.clip.low > 1e-3
    assert spec.policy_version == 3
    assert (spec.offset, spec.own_mean) == (0.0, False)


def test_later_mini_batches_and_recomputed_steps_teach_it_nothing():
    g, (mini,) = begun(config(recentre=True))
    g.observe(first(lag_2=-0.01), 1)
    assert g.loss_spec(mini, 1, recomputed=False).lag_offsets.known == {}
    g.loss_spec(mini, 0, recomputed=True)
    g.observe(first(lag_2=-0.01), 0)
    assert g.remedies.offsets == {}


@pytest.mark.parametrize(
    ("old", "correction", "version", "ignored"),
    [
        ("recompute", "none", 1, 1.0),
        ("recompute", "geometric_truncate", 1, 0.0),
        ("rollout", "none", 1, 0.0),
        ("recompute", "none", 3, None),
    ],
)
def test_a_ratio_that_ignores_the_age_says_so(old, correction, version, ignored):
    g, (mini,) = begun(config(old, correction), version)
    g.loss_spec(mini, 0, recomputed=old == "recompute")
    assert g.metrics().get("staleness/ignored") == ignored


def test_a_guard_goes_on_from_a_checkpoint_with_and_without_remedies():
    g, (mini,) = begun(config(recentre=True))
    g.observe(first(lag_2=-0.01), 0)
    state = json.loads(json.dumps(g.state_dict()))
    again, _ = begun(config(recentre=True))
    again.load_state_dict(state)
    assert again.loss_spec(mini, 1, recomputed=False) == g.loss_spec(mini, 1, recomputed=False)
    del state["remedies"]  # of a version before them
    begun(config(recentre=True))[0].load_state_dict(state)
