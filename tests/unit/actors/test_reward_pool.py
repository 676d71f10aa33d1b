"""Laws of judging on a cluster: the same verdicts and the same rule as in one process."""

from __future__ import annotations

import re

import numpy as np
import pytest
import ray

from gspo_dist.actors.process import ProcessDied
from gspo_dist.actors.reward_pool import RayRewardPool
from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import RewardError
from gspo_dist.types import Completion, Prompt

pytestmark = pytest.mark.slow
BEHAVIOUR = """
import os, time

def judge(prompt, completion):
    text = completion.text
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise KeyError("gold")
    if text == "print":
        print("the reward's own words", flush=True)
        return 1.0
    return float(text), {"parent": os.getppid(), "bare": completion.routing is None}
"""


def items_of(*texts: str):
    columns = np.zeros(1, np.int64), np.ones(1, bool), np.zeros(1, np.float32), np.zeros(1, np.int32)
    return [
        (10 + i, Prompt(f"p{i}", (1,), "q"), Completion(*columns, "stop", t)) for i, t in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "reward.py").write_text(BEHAVIOUR)
    return folder


@pytest.fixture(scope="module")
def pool(ray_here, folder):
    """Two workers; the file was named from its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = RewardConfig(function="reward.py:judge", workers=2, timeout_s=1.0, timeout_reward=-1.0)
        pool = RayRewardPool(config, folder / "logs")
    pool.start()
    pool.start()
    yield pool
    pool.close()
    pool.close()
    with pytest.raises(ProcessDied):
        pool.judge(items_of("1"))


def test_verdicts_come_in_order_and_the_work_is_spread_evenly(pool):
    verdicts = pool.judge(items_of("0", "1", "2", "3", "4"))
    assert [verdict.reward for verdict in verdicts] == [0.0, 1.0, 2.0, 3.0, 4.0]
    who = [verdict.parts["parent"] for verdict in verdicts]
    assert (len(set(who[:3])), len(set(who[3:])), len(set(who))) == (1, 1, 2)


def test_fewer_items_than_workers_and_none(pool):
    assert [verdict.reward for verdict in pool.judge(items_of("7"))] == [7.0]
    assert pool.judge([]) == []


def test_late_and_dead_rewards_cost_their_rollouts_only(pool):
    verdicts = pool.judge(items_of("1", "hang", "2", "die", "3"))
    assert [verdict.reward for verdict in verdicts] == [1.0, -1.0, 2.0, -1.0, 3.0]
    assert [set(verdict.parts) & {"timeout", "crash"} for verdict in verdicts] == [
        set(), {"timeout"}, set(), {"crash"}, set(),
    ]  # fmt: skip


def test_the_rollouts_of_a_killed_worker_are_judged_again(pool):
    ray.kill(pool.actors.handles["reward-1"])
    verdicts = pool.judge(items_of("0", "1", "2", "3"))
    assert [verdict.reward for verdict in verdicts] == [0.0, 1.0, 2.0, 3.0]
    [event] = [event for event in pool.take_events() if event.who == "reward-1"]
    assert event.kind == "reward_death"
    assert pool.take_events() == []


def test_a_failing_reward_names_its_rollout_and_its_line(pool):
    with pytest.raises(
        RewardError, match=r"reward of rollout 11 \(prompt p1\) raised KeyError: 'gold'"
    ) as caught:
        pool.judge(items_of("1", "raise", "2", "3"))
    assert any('raise KeyError("gold")' in note for note in caught.value.__notes__)
    assert [verdict.reward for verdict in pool.judge(items_of("4", "5"))] == [4.0, 5.0]


def test_what_a_reward_prints_is_in_the_log_of_its_worker(pool, folder):
    pool.judge(items_of("print"))
    assert "the reward's own words" in (folder / "logs" / "reward-0.log").read_text()


def test_a_reward_that_cannot_be_imported_is_told_at_the_start(ray_here, tmp_path):
    (tmp_path / "bad.py").write_text("import no_such_package\ndef f(p, c): return 1\n")
    pool = RayRewardPool(RewardConfig(function=f"{tmp_path}/bad.py:f"), tmp_path)
    with pytest.raises(ValueError, match=re.escape("raised ModuleNotFoundError: No module named 'no_such_")):
        pool.start()
    pool.close()
