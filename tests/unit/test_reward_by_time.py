"""benchmarks/reward_by_time.py: runs of numbers, and seconds that were worked out by hand."""

from __future__ import annotations

import json

import pytest

from tests.unit.benchmark_script import BENCHMARKS, loaded


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        with loaded("reward_by_time") as module:
            yield module


def write_run(folder, ahead, rewards, *, update=2.0, old=0.0, whole=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"rollout": {"steps_ahead": ahead}}))
    rows = [{"step": 0, "eval/heldout/accuracy": 0.5}]  # before the first step: no reward
    rows += [
        {"step": i, "rollout/reward_mean": reward, "time/update_s": update, "time/old_logprobs_s": old}
        for i, reward in enumerate(rewards, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if whole:
        (folder / "summary.json").write_text("{}")


def test_only_finished_runs_are_read(script, tmp_path):
    write_run(tmp_path / "a" / "seed-0", 2, [0.1, 0.2], old=0.5)
    write_run(tmp_path / "a" / "seed-1", 2, [0.3], whole=False)
    write_run(tmp_path / "b" / "seed-0", 0, [0.1], whole=False)
    assert script.read_arm(tmp_path / "a") == script.Arm("a", 2, 0.25, [[0.1, 0.2]])
    assert script.read_arm(tmp_path / "b") is None


def test_runs_of_two_settings_are_no_arm(script, tmp_path):
    write_run(tmp_path / "a" / "seed-0", 1, [0.1])
    write_run(tmp_path / "a" / "seed-1", 2, [0.1])
    with pytest.raises(ValueError, match=r"must have one rollout.steps_ahead: .*a has \[1, 2\]"):
        script.read_arm(tmp_path / "a")


def test_all_arms_are_read_at_one_second(script):
    """Steps of 2 s and 1 s, eight each: the fast arm is out of steps at second 8, when the slow one has four.
    A moment is the mean of four steps: 0.0 to 0.3 is 0.15, 0.4 to 0.7 is 0.55."""
    rising = [i / 10 for i in range(8)]
    arms = [script.Arm("slow", 0, 0.0, [rising]), script.Arm("fast", 1, 0.0, [rising])]
    head, _, slow, fast = script.table(arms, [2.0, 1.0])
    assert "reward at step 8 | steps in 8 s | reward after 8 s" in head
    assert slow == "| slow | 0 | 2.00 | 0.550 | 4 | 0.150 |"
    assert fast == "| fast | 1 | 1.00 | 0.550 | 8 | 0.550 |"


def test_a_curve_begins_where_a_moment_has_its_steps(script):
    """Two seeds of five steps, 3 s each: means of steps 1 to 4 and 2 to 5 at 12 s and 15 s."""
    arm = script.Arm("a", 0, 0.0, [[0.0, 0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5, 0.6]])
    seconds, rewards = script.curve(arm, 3.0)
    assert seconds == [12.0, 15.0]
    assert rewards == pytest.approx([0.25, 0.35])


def test_recomputation_lengthens_the_learners_part_only(script):
    """Fixed lengths of one token: sampling takes one decode step of 64 / 2 = 32 sequences, so a synchronous
    step takes 1 + 3 s without and 1 + 3 * 1.5 s with recomputation at half the update's time."""
    case = script.Case(median=1, spread=0.0, tick_s=1.0, per_sequence_s=0.0, learn_s=3.0, publish_s=0.0)
    seconds = [script.step_seconds(script.Arm("a", 0, share, [[]]), case) for share in (0.0, 0.5)]
    assert seconds == pytest.approx([4.0, 5.5])
    ahead = script.step_seconds(script.Arm("a", 1, 0.5, [[]]), case)
    assert ahead == pytest.approx(4.5, rel=0.02)  # sampling hides behind learning
