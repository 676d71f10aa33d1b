"""Whole runs on batches that are one step old by construction: what is staleness is not taken for mismatch.

Engine and learner both compute in fp32, so all that the engine's log-probs differ by is the age of the data.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.unit.trainer.small import config, go

STALE_ROWS = slice(2, None)
"""Row 0 is the evaluation, and step 1 has nothing older than itself."""


class Books:
    """Before every first mini-batch: the ratio of every sequence to the engine's log-probs, in float64."""

    def __init__(self, run) -> None:
        self.rows, forward = [], run.learner.forward_backward

        def watched(mini, spec):
            if run.learner.policy_version % run.config.mini_batches == 0:
                self.rows.append(list(sequences(run.learner, mini)))
            return forward(mini, spec)

        run.learner.forward_backward = watched


def sequences(learner, mini):
    """(log s, advantage, tokens) of every sequence of a mini-batch."""
    for batches, outputs in zip(mini.micro_batches, learner.logprobs(mini.micro_batches), strict=True):
        for batch, output in zip(batches, outputs, strict=True):
            for sequence in range(batch.num_sequences):
                rows = batch.rows(sequence)
                mask = batch.loss_mask[rows].numpy()
                ours = output.logprobs[rows].numpy().astype(np.float64)[mask]
                theirs = batch.rollout_logprobs[rows].numpy().astype(np.float64)[mask]
                yield float(np.mean(ours - theirs)), float(batch.advantages[rows][-1]), int(mask.sum())


def stale_run(model, reward_file, folder, *extra):
    books = []

    # Enough ticks beside the learner for the whole next step, which is then one publication old.
    ahead = ("rollout.steps_ahead=1", "rollout.ticks_per_step=64")
    reward = f"reward.function='{reward_file}:spread'"
    c = config(model, reward_file, folder, "steps=4", reward, *ahead, *extra)
    _, rows = go(c, lambda run: books.append(Books(run)))
    return rows, books[0].rows


@pytest.mark.slow
def test_staleness_is_not_taken_for_mismatch(model, reward_file, tmp_path):
    """Laws 20 and 21 on the engine's log-probs: a batch one step old, two mini-batches a step."""
    knobs = ("flips.every=1", "rollout.weight_sync.probe_every=50")  # it probes every time all the same
    rows, books = stale_run(model, reward_file, tmp_path / "run", *knobs)
    assert rows[1]["rollout/staleness"] == 0.0
    assert rows[1]["rollout/versions_per_completion"] == 1.0
    assert rows[1]["mismatch/abs_log_ratio_max"] < 1e-5
    assert not [key for key in rows[1] if key.startswith("staleness/")]
    for row, seen in zip(rows[STALE_ROWS], books[1:], strict=True):
        assert (row["rollout/staleness"], row["rollout/staleness_publications"]) == (2.0, 1.0)
        assert not [key for key in row if key.startswith(("mismatch/", "routing/engine"))]
        assert row["guard/from_probe"] == 1.0
        assert abs(row["guard/offset_clip_widths"]) < 0.05
        assert row["guard/active"] == 0.0
        means = [mean for mean, _, _ in seen]
        assert abs(np.mean(means)) > 3e-4  # a clip width and more, all of it the policy's own movement
        assert row["staleness/log_ratio_mean"] == pytest.approx(np.mean(means), rel=1e-3, abs=1e-7)
        assert row["staleness/log_ratio_mean/lag_2"] == pytest.approx(np.mean(means), rel=1e-3, abs=1e-7)
        assert row["staleness/log_ratio_std"] == pytest.approx(np.std(means), rel=1e-3)
        outside = [m < math.log1p(-3e-4) or m > math.log1p(4e-4) for m in means]
        assert row["staleness/outside_clip_fraction"] == pytest.approx(np.mean(outside), abs=1e-12)
        lost = [(m < math.log1p(-3e-4) and a < 0) or (m > math.log1p(4e-4) and a > 0) for m, a, _ in seen]
        tokens = [n for _, _, n in seen]
        expected = np.dot(lost, tokens) / sum(tokens)
        assert expected > 0.2
        assert row["objective/mini_batch_0/clip_fraction"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_recomputed_log_probs_clip_nothing_in_the_first_mini_batch(model, reward_file, tmp_path):
    """Law 21, the other half. What the ratio now leaves out is still reported."""
    rows, books = stale_run(model, reward_file, tmp_path / "run", "objective=gspo_recompute")
    for row, seen in zip(rows[STALE_ROWS], books[1:], strict=True):
        assert row["objective/mini_batch_0/clip_fraction"] == 0.0
        assert row["objective/mini_batch_0/approx_kl_k3"] == 0.0
        assert row["staleness/token_fraction"] == 1.0
        assert abs(row["staleness/log_ratio_mean"]) > 3e-4
        assert len(seen) == 8
        assert not [key for key in row if key.startswith("mismatch/")]


@pytest.mark.slow
def test_the_remedies_take_what_the_first_mini_batch_measured(model, reward_file, tmp_path, caplog):
    """Offsets by age and a clip that follows what is left of the spread, in a run one step old."""
    specs = []

    def watch(run):
        forward = run.learner.forward_backward

        def watched(mini, spec):
            specs.append(spec)
            return forward(mini, spec)

        run.learner.forward_backward = watched

    knobs = ("steps=3", "objective.staleness.recentre=true", "objective.staleness.clip_spreads=1")
    ahead = ("rollout.steps_ahead=1", "rollout.ticks_per_step=64", f"reward.function='{reward_file}:spread'")
    _, rows = go(config(model, reward_file, tmp_path / "run", *ahead, *knobs), watch)
    for step in (2, 3):
        row, (first, second) = rows[step], specs[2 * step - 2 : 2 * step]
        offset = row["staleness/log_ratio_mean/lag_2"]
        assert second.lag_offsets.known == pytest.approx({2: offset}, rel=1e-12)
        assert (first.lag_offsets.own, second.lag_offsets.own) == (True, False)
        scale = min(max(1.0, row["staleness/log_ratio_std"] / 3e-4), 0.01 / 4e-4)
        assert row["staleness/clip_scale"] == pytest.approx(scale, rel=1e-9)
        assert second.objective.clip.low == pytest.approx(3e-4 * scale, rel=1e-9)
    assert specs[4].objective.clip.low == pytest.approx(specs[3].objective.clip.low, rel=1e-12)
    assert "rollout.steps_ahead=1: the clip sees the age: with the engine's log-probs" in caplog.text
