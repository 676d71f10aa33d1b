"""The numbers of a step, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gspo_dist.config import RolloutConfig
from gspo_dist.learners.learner import OptimStep
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives.aggregate import Segments
from gspo_dist.objectives.mismatch import mismatch_stats
from gspo_dist.trainer.step_metrics import (
    StepMetrics,
    length_metrics,
    packing_metrics,
    replay_metrics,
    rollout_metrics,
    sample_rows,
    speed_metrics,
    turn_metrics,
    turn_rows,
    update_metrics,
)
from gspo_dist.types import Turn
from tests.unit.trainer.small import packed, rollout, trace


def f64(value: float | list[float]) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def mean(value: float, weight: float) -> Stat:
    return Stat(f64(value * weight), f64(weight), "mean")


def total(value: float) -> Stat:
    return Stat(f64(value), f64(1.0), "sum")


def test_a_batch_described_by_hand():
    rollouts = [
        rollout(0, group=0, reward=1.0, tokens=[5] * 2, version=4, parts={"format": 1.0}),
        rollout(1, group=0, reward=0.0, tokens=[5] * 4, version=3, finish="length", parts={"timeout": 1.0}),
        rollout(2, group=1, reward=1.0, tokens=[5] * 6, version=4, parts={"format": 0.5}),
        rollout(3, group=1, reward=1.0, tokens=[5] * 8, version=4),
    ]
    out = rollout_metrics(rollouts, np.array([1.0, -1.0, 0.0, 0.0]), policy_version=5)
    assert out["rollout/reward_mean"] == 0.75
    assert out["rollout/reward_std"] == pytest.approx(math.sqrt(0.1875), rel=1e-12)
    assert out["rollout/completion_tokens_mean"] == 5.0
    assert out["rollout/completion_tokens_max"] == 8.0
    assert out["rollout/truncated_fraction"] == 0.25
    assert out["rollout/degenerate_group_fraction"] == 0.5
    assert out["rollout/staleness"] == 2.0  # version 5 learns from a token of version 3
    assert out["rollout/staleness_publications"] == 2.0  # one mini-batch, where nothing else is said
    assert (out["advantage/mean"], out["advantage/zero_fraction"]) == (0.0, 0.5)
    assert out["reward/format"] == pytest.approx(1.5 / 4)
    assert out["reward/timeout_fraction"] == 0.25
    assert "reward/timeout" not in out


def test_rewards_that_differ_make_a_group_that_teaches():
    """Group 0 has rewards 0 and 1, group 1 twice 1, group 2 twice 0: two of three teach nothing."""
    rewards = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    rollouts = [rollout(i, group=i // 2, reward=reward) for i, reward in enumerate(rewards)]
    out = rollout_metrics(rollouts, np.zeros(6), 3)
    assert out["rollout/degenerate_group_fraction"] == pytest.approx(2 / 3, rel=1e-12)


def test_the_limit_of_completions_is_reported_where_it_changes():
    assert length_metrics(RolloutConfig(max_completion_tokens=16), 3) == {}
    growing = RolloutConfig(max_completion_tokens=16, length_schedule=[[1, 8], [3, 16]])
    limits = [length_metrics(growing, step) for step in (1, 2, 3)]
    assert limits == [{"rollout/max_completion_tokens": limit} for limit in (8.0, 8.0, 16.0)]


def episode(index, turns, mask, finish="stop"):
    r = dated(index, [3] * len(mask), mask)
    return replace(r, completion=replace(r.completion, turns=tuple(turns), finish_reason=finish))


RESET, SAID = Turn(0, 0, 1), Turn(1, 3, 4, "go", "gone", 0.5)


def test_episodes_are_described_by_their_turns_and_what_failed():
    """Ten tokens, of which three are the environment's. A rollout without turns counts nowhere."""
    batch = [
        episode(0, [RESET, SAID, Turn(4, 6, 6)], [False, True, True, False, True, True], "turns"),
        episode(1, [RESET, Turn(1, 4, 4, failed="crash")], [False, True, True, True]),
        rollout(2, tokens=[5] * 90),
    ]
    expected = {
        "environment/turns_mean": 1.5,
        "environment/turns_max": 2.0,
        "environment/token_fraction": 1.0 - 7 / 10,
        "environment/out_of_turns_fraction": 0.5,
        "environment/failed_fraction": 0.5,
        "environment/timeout_fraction": 0.0,
        "environment/crash_fraction": 0.5,
        "environment/error_fraction": 0.0,
    }
    assert turn_metrics(batch) == pytest.approx(expected, rel=1e-12)
    whole = rollout_metrics(batch, np.zeros(3), 3)
    assert {key: whole[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert turn_metrics(batch[2:]) == {}
    # The first turn that failed names the episode.
    twice = episode(0, [RESET, replace(SAID, failed="timeout"), replace(SAID, failed="error")], [True] * 4)
    out = turn_metrics([twice])
    assert (out["environment/timeout_fraction"], out["environment/error_fraction"]) == (1.0, 0.0)
    assert out["environment/out_of_turns_fraction"] == 0.0


def test_the_turns_of_an_episode_are_rows_for_a_reader():
    late = Turn(4, 7, 7, "more", failed="error")
    r = episode(0, [RESET, SAID, late], [False, True, True, False, True, True, True])
    versions = np.array([0, 4, 3, 0, 4, 4, 6], np.int32)
    completion = replace(r.completion, policy_versions=versions)
    assert turn_rows(completion) == {
        "turns": [
            {"said": "", "answer": "", "reward": 0.0, "tokens": 0, "versions": []},
            {"said": "go", "answer": "gone", "reward": 0.5, "tokens": 2, "versions": [3, 4]},
            {"said": "more", "answer": "", "reward": 0.0, "tokens": 3, "versions": [4, 6], "failed": "error"},
        ]
    }
    assert turn_rows(rollout(0).completion) == {}
    (row,) = sample_rows([replace(r, completion=completion)], np.zeros(1), 1)
    assert [turn["tokens"] for turn in row["turns"]] == [0, 2, 3]


def dated(index, versions, mask=None):
    """A rollout whose tokens are of these versions."""
    r = rollout(index, tokens=[5] * len(versions))
    changes = {"policy_versions": np.array(versions, np.int32)}
    if mask is not None:
        changes["loss_mask"] = np.array(mask)
    return replace(r, completion=replace(r.completion, **changes))


def test_the_age_of_a_batch_is_counted_over_its_trained_tokens():
    """Version 12 with 4 mini-batches: ages 8 8 4 | 0 0. A tool's token, of version 0, has none."""
    rollouts = [dated(0, [4, 4, 0, 8], [True, True, False, True]), dated(1, [12, 12])]
    out = rollout_metrics(rollouts, np.zeros(2), 12, mini_batches=4)
    assert out["rollout/staleness"] == 8.0
    assert out["rollout/staleness_mean"] == (8 + 8 + 4) / 5
    assert out["rollout/staleness_publications"] == 2.0
    assert out["rollout/versions_per_completion"] == 1.5
    assert out["rollout/versions_per_completion_max"] == 2.0
    assert rollout_metrics(rollouts, np.zeros(2), 12, mini_batches=3)["rollout/staleness_publications"] == 3.0


def test_the_spread_of_staleness_is_logged_and_not_its_square():
    minis = first_and_second()
    minis[0] |= {"staleness/log_ratio_mean": mean(-0.3, 4), "staleness/log_ratio_square": mean(0.25, 4)}
    out = update_metrics(minis, [OptimStep(1.0, 0.1, 1), OptimStep(1.0, 0.1, 2)])
    assert out["staleness/log_ratio_mean"] == pytest.approx(-0.3, rel=1e-12)
    assert out["staleness/log_ratio_std"] == pytest.approx(0.4, rel=1e-12)
    assert "staleness/log_ratio_square" not in out


def test_only_a_reward_of_one_counts_as_right():
    rollouts = [rollout(0, reward=0.99, tokens=[5] * 2), rollout(1, reward=1.0, tokens=[5] * 6)]
    out = rollout_metrics(rollouts, np.zeros(2), 0)
    assert out["rollout/length_correct_tokens"] == 6.0
    assert out["rollout/length_wrong_tokens"] == 2.0


def test_packing_is_counted_over_all_replicas_and_mini_batches():
    minis = packed([rollout(i, tokens=[5] * 6) for i in range(4)], mini_batches=2, replicas=2)
    assert packing_metrics(minis, 64) == {
        "packing/micro_batches": 4.0,
        "packing/efficiency": 4 * 8 / (4 * 64),
    }


def first_and_second() -> list[dict[str, Stat]]:
    def stats(loss: float, clipped: float, ratio: float, square: float, weight: float) -> dict[str, Stat]:
        return {
            "objective/loss": total(loss),
            "objective/tokens": total(10.0 * weight),
            "objective/sequences": total(weight),
            "objective/clip_fraction": mean(clipped, weight),
            "objective/approx_kl_k3": mean(clipped / 2, weight),
            "objective/sequence_log_ratio_mean": mean(ratio, weight),
            "objective/sequence_log_ratio_square": mean(square, weight),
            "values/sequence_log_ratio": Stat.concat(torch.tensor([0.0, math.log(2.0)], dtype=torch.float64)),
        }

    return [stats(2.0, 0.1, 0.5, 0.5, 1.0), stats(4.0, 0.5, 0.1, 0.3, 3.0)]


def test_sums_of_a_mini_batch_are_averaged_over_them_and_counts_are_added():
    out = update_metrics(first_and_second(), [OptimStep(1.0, 0.1, 4), OptimStep(3.0, 0.2, 5)])
    assert out["objective/loss"] == 3.0  # (2 + 4) / 2
    assert out["objective/tokens"] == 40.0
    assert out["objective/sequences"] == 4.0
    assert out["objective/clip_fraction"] == pytest.approx((0.1 + 3 * 0.5) / 4, rel=1e-12)
    assert out["learner/grad_norm"] == 2.0
    assert out["learner/lr"] == 0.2
    assert "learner/loss_scale" not in out
    scaled = [OptimStep(1.0, 0.1, 4, loss_scale=8.0), OptimStep(1.0, 0.1, 5, loss_scale=4.0)]
    assert update_metrics(first_and_second(), scaled)["learner/loss_scale"] == 4.0
    assert out["learner/policy_version"] == 5.0
    alone = update_metrics(first_and_second()[:1], [OptimStep(1.0, 0.1, 4, loss_scale=2.0)])
    assert (alone["objective/loss"], alone["learner/loss_scale"]) == (2.0, 2.0)


def test_a_skipped_step_is_counted_and_its_norm_left_out():
    skipped = OptimStep(math.inf, 0.2, 4, skipped=True)
    out = update_metrics(first_and_second(), [OptimStep(3.0, 0.1, 4), skipped])
    assert (out["learner/skipped_steps"], out["learner/grad_norm"]) == (1.0, 3.0)
    out = update_metrics(first_and_second(), [skipped, skipped])
    assert (out["learner/skipped_steps"], out["learner/policy_version"]) == (2.0, 4.0)
    assert math.isnan(out["learner/grad_norm"])


def test_the_log_ratio_is_reported_by_mean_and_standard_deviation():
    out = update_metrics(first_and_second(), [OptimStep(1.0, 0.1, 4)] * 2)
    average, square = (0.5 + 3 * 0.1) / 4, (0.5 + 3 * 0.3) / 4
    assert out["objective/log_ratio_mean"] == pytest.approx(average, rel=1e-12)
    assert out["objective/log_ratio_std"] == pytest.approx(math.sqrt(square - average**2), rel=1e-12)
    assert not any(name.startswith(("values/", "moment/")) or "sequence_log_ratio" in name for name in out)


def test_quantiles_of_the_ratio_are_over_the_sequences_of_all_mini_batches():
    """Ratios 1, 2, 1, 2: half of them each, so the median lies between."""
    out = update_metrics(first_and_second(), [OptimStep(1.0, 0.1, 4)] * 2)
    assert out["objective/sequence_ratio/q50"] == pytest.approx(1.5, rel=1e-12)
    assert out["objective/sequence_ratio/q99"] == pytest.approx(2.0, rel=1e-12)


def test_clip_fractions_are_reported_by_mini_batch():
    out = update_metrics(first_and_second(), [OptimStep(1.0, 0.1, 4)] * 2)
    assert out["objective/mini_batch_0/clip_fraction"] == pytest.approx(0.1, rel=1e-12)
    assert out["objective/mini_batch_1/clip_fraction"] == pytest.approx(0.5, rel=1e-12)
    assert out["objective/mini_batch_1/approx_kl_k3"] == pytest.approx(0.25, rel=1e-12)
    assert "objective/mini_batch_2/clip_fraction" not in out


def test_clip_fractions_of_a_mini_batch_are_its_means():
    """Twice the same mini-batch: the mean of its statistic, never its sum or its weight."""
    first, second = first_and_second()
    second["objective/clip_fraction_positive"] = mean(0.25, 8.0)
    second["objective/clip_fraction_negative"] = mean(0.75, 8.0)
    out = update_metrics([first, second], [OptimStep(1.0, 0.1, 4)] * 2)
    assert out["objective/mini_batch_1/clip_fraction_positive"] == 0.25
    assert out["objective/mini_batch_1/clip_fraction_negative"] == 0.75
    assert "objective/mini_batch_0/clip_fraction_positive" not in out


def test_the_mismatch_is_reported_of_the_moments_of_all_mini_batches():
    """Two tokens of one sequence in each: the learner says -1, -2 and -3, -2; the engine -1 everywhere."""
    minis = first_and_second()
    old = [f64([-1.0, -2.0]), f64([-3.0, -2.0])]
    for stats, values in zip(minis, old, strict=True):
        stats |= mismatch_stats(values, f64([-1.0, -1.0]), Segments(torch.zeros(2, dtype=torch.long), 1))
    out = update_metrics(minis, [OptimStep(1.0, 0.1, 4)] * 2)
    assert out["mismatch/kl"] == pytest.approx((0 + 1 + 2 + 1) / 4, rel=1e-12)
    assert out["mismatch/log_ratio_mean"] == pytest.approx((-0.5 - 1.5) / 2, rel=1e-12)
    assert out["mismatch/log_ratio_std"] == pytest.approx(0.5, rel=1e-12)
    assert "mismatch/log_ratio_square" not in out
    assert not any(name.startswith("moment/") for name in out)
    assert not any(
        name.startswith("mismatch/")
        for name in update_metrics(first_and_second(), [OptimStep(1.0, 0.1, 4)] * 2)
    )


def test_replay_costs_what_its_traces_weigh():
    """Two layers, top-2 of 8 experts: 4 bytes per token, and one that marks known rows."""
    rollouts = [rollout(i, routing=trace(5, 1)) for i in range(2)]
    (mini,) = packed(rollouts)
    assert replay_metrics("none", [mini], rollouts, recomputed=True) == {}
    out = replay_metrics("r3", [mini], rollouts, recomputed=True)
    assert out["routing/replay_bytes"] == 2 * 5 * (2 * 2 + 1)
    assert out["routing/replay_bytes_per_token"] == 5.0
    assert out["routing/native_row_fraction"] == 0.0
    known = np.array([True, True, True, True, False])  # the last token of a sequence was not routed
    last = [rollout(i, routing=replace(trace(5, 1), known=known)) for i in range(2)]
    assert replay_metrics("r3", [mini], last, recomputed=True)["routing/native_row_fraction"] == 2 / 10
    routed = mini.with_traces(rollouts)
    own = replay_metrics("r2", [routed], [rollout(0)], recomputed=True)
    assert own["routing/replay_bytes"] == 50.0
    assert "routing/replay_mixed_fraction" not in own  # R2's traces are of one policy
    device = "routing/replay_device_copies_bytes"
    assert replay_metrics("r3", [mini], rollouts, recomputed=False)[device] < out[device]


def test_completions_of_more_than_one_policy_have_mixed_traces():
    """Two policies, three of them, and two of which one has no trained token: 2 of 3 are mixed."""
    versions = [([4, 8], None), ([4, 8, 12], None), ([4, 0], [True, False])]
    rollouts = [
        replace(r, completion=replace(r.completion, routing=trace(2 + len(r.completion), 1)))
        for r in (dated(i, ages, mask) for i, (ages, mask) in enumerate(versions))
    ]
    out = replay_metrics("r3", packed(rollouts), rollouts, recomputed=True)
    assert out["routing/replay_mixed_fraction"] == pytest.approx(2 / 3, rel=1e-12)


def test_speeds_are_tokens_over_the_seconds_of_their_part():
    times = {"time/step_s": 4.0, "time/collect_s": 2.0, "time/update_s": 0.5}
    out = speed_metrics(times, [rollout(0), rollout(1)], tokens_seen=100, sampled=(90, 5.0))
    assert out == times | {
        "perf/tokens_per_s": 6 / 4.0,  # completion tokens
        "perf/collect_tokens_per_s": 90 / 5.0,  # whichever steps they were for
        "perf/update_tokens_per_s": 10 / 0.5,  # prompts are learnt on too
        "rollout/completion_tokens_total": 100.0,
    }
    # A step that a resumed run found whole had nothing to sample.
    assert speed_metrics(times, [rollout(0)], 1, (0, 0.0))["perf/collect_tokens_per_s"] == 0.0


def test_samples_are_spread_over_the_batch():
    rollouts = [rollout(i, reward=float(i)) for i in range(9)]
    rows = sample_rows(rollouts, np.arange(9) / 10, 3)
    assert [r["rollout_id"] for r in rows] == [0, 4, 8]
    assert [r["rollout_id"] for r in sample_rows(rollouts, np.zeros(9), 2)] == [0, 8]
    assert rows[1] == {
        "rollout_id": 4,
        "prompt": "q4",
        "completion": "c4",
        "answer": "42",
        "reward": 4.0,
        "advantage": 0.4,
        "tokens": 3,
        "finish_reason": "stop",
    }
    assert sample_rows(rollouts, np.zeros(9), 0) == []
    assert len(sample_rows(rollouts, np.zeros(9), 99)) == 9


def test_a_row_joins_all_parts_and_refuses_a_name_that_two_report():
    whole = StepMetrics(
        rollouts={"a": 1.0},
        packing={"b": 2.0},
        update={"c": 3.0},
        old_logprobs={"d": 4.0},
        routing={"e": 5.0},
        sync={"f": 6.0},
        speed={"g": 7.0},
        evaluation={"h": 8.0},
        samples=[{"not": "a number"}],
    )
    assert whole.row() == dict(zip("abcdefgh", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], strict=True))
    # What ends a step is filled in later.
    begun = StepMetrics(rollouts={"a": 1.0}, packing={}, update={}, old_logprobs={}, routing={})
    assert (begun.row(), begun.samples, begun.episodes) == ({"a": 1.0}, [], [])
    whole.evaluation = {"c": 9.0}
    with pytest.raises(ValueError, match="every metric once: got c from two parts"):
        whole.row()
