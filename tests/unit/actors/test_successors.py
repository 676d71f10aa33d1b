"""Who takes the place of an engine or a reward worker that died, when, and how often: on a virtual clock."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from gspo_dist.actors import rollout_pool
from gspo_dist.actors.process import ProcessDied
from gspo_dist.actors.reward_pool import RayRewardPool
from gspo_dist.actors.rollout_pool import START_TIMEOUT_S, SUCCESSORS, RayRolloutPool
from gspo_dist.config import RewardConfig, RolloutConfig
from gspo_dist.failures import Event
from gspo_dist.rewards.pool import DEATHS_IN_A_ROW
from gspo_dist.rewards.reward import RewardError
from gspo_dist.types import Completion, Prompt
from tests.unit.actors.virtual_ray import NEVER, VirtualRay, died, raised

# --- engines and their successors ---------------------------------------------------------------------------


def make_pool(folder: Path, engines: int = 2, timeout_s: float = 60.0, gpus=()) -> RayRolloutPool:
    config = RolloutConfig(engines=engines, timeout_s=timeout_s)
    options = [{"place": i} for i in range(engines)]
    return RayRolloutPool(config, "make", options, folder, gpus)


def starts(world: VirtualRay) -> list[str]:
    """Whose engines were begun to be built, in order."""
    return [call[0] for call in world.calls if call[1] == "start"]


@pytest.fixture
def pool(world, tmp_path) -> RayRolloutPool:
    """Two engines that are up, at time 0. A successor takes 50 seconds."""
    world.answers = {"start": [(0.0, "info"), (0.0, "info"), (50.0, "info")]}
    pool = make_pool(tmp_path)
    pool.start()
    world.calls.clear(), world.waits.clear()
    return pool


@pytest.mark.parametrize(("timeout_s", "limit"), [(60.0, START_TIMEOUT_S), (2000.0, 2000.0)])
def test_engines_load_side_by_side_from_the_moment_that_they_are_made(
    world, tmp_path, timeout_s, limit
) -> None:
    world.answers = {("engine-0", "start"): [(300.0, "first")], ("engine-1", "start"): [(100.0, "second")]}
    pool = make_pool(tmp_path, timeout_s=timeout_s, gpus=[("4", "5")])
    assert world.calls == [
        ("engine-0", "start", "make", ("4", "5"), False),
        ("engine-1", "start", "make", (), False),
    ]
    assert (pool.start(), world.now, world.waits[0]) == ("first", 300.0, limit)
    assert pool.starting == {}


def test_a_dead_engine_is_ended_and_its_successor_has_its_place(world, pool, caplog) -> None:
    old = pool.actors.handles["engine-1"]
    with caplog.at_level(logging.WARNING):
        pool.bury("engine-1", OSError("a worker is gone"))
    assert "engine-1 is dead, the others go on with its work: a worker is gone" in caplog.text
    new = pool.actors.handles["engine-1"]
    assert (world.killed, new.options, new.made) == ([old], {"place": 1}, old.made)
    assert (starts(world), list(pool.starting)) == (["engine-1"], ["engine-1"])


def test_who_is_up_is_told_without_waiting_and_only_once(world, pool) -> None:
    for name in ("engine-0", "engine-1"):
        pool.bury(name, OSError())
    world.now = 49.5
    assert (pool.newcomers(wait=False), world.now) == ([], 49.5)
    world.now = 50.0
    assert pool.newcomers(wait=False) == ["engine-0", "engine-1"]
    assert (pool.newcomers(wait=False), pool.newcomers(wait=True), world.now) == ([], [], 50.0)


def test_the_first_successor_is_waited_for_where_nobody_else_is_left(world, pool) -> None:
    world.answers["start"] = [(70.0, "info"), (50.0, "info"), NEVER]
    for name in ("engine-0", "engine-1"):
        pool.bury(name, OSError())
    assert (pool.newcomers(wait=True), world.now) == (["engine-1"], 50.0)
    assert (pool.newcomers(wait=True), world.now) == (["engine-0"], 70.0)
    pool.bury("engine-0", OSError())
    assert (pool.newcomers(wait=True), world.now) == ([], 70.0 + START_TIMEOUT_S)


def test_successors_that_die_in_a_row_are_followed_by_three_at_most(world, pool, caplog) -> None:
    """The fourth is one too many. A publication that an engine took part in sets its count to nothing."""
    world.answers["start"] = [(10.0, died("no memory")), (20.0, "info")]
    pool.bury("engine-1", OSError())
    with caplog.at_level(logging.WARNING):
        assert (pool.newcomers(wait=True), world.now) == (["engine-1"], 30.0)
    assert "the successor of engine-1 did not come up: engine-1 died: no memory" in caplog.text
    assert pool.attempts == {"engine-0": 0, "engine-1": 2}
    pool.alive = ["engine-1"]
    world.answers["finish_weight_update"] = [(1.0, "a receipt")]
    assert pool.finish_weight_update(3, 60.0) == {"engine-1": "a receipt"}
    assert pool.attempts == {"engine-0": 0, "engine-1": 0}
    world.answers["start"] = [(10.0, died("no memory"))]
    world.calls.clear()
    pool.bury("engine-1", OSError())
    with caplog.at_level(logging.ERROR):
        assert pool.newcomers(wait=True) == []
    assert starts(world) == ["engine-1"] * SUCCESSORS == ["engine-1"] * 3
    assert "engine-1 is given up: 3 successors in a row died before a publication" in caplog.text
    assert pool.starting == {}


def test_a_successor_is_built_only_while_the_engines_have_the_gpus_and_comes_up_asleep(world, pool) -> None:
    pool.sleep()
    assert world.calls == [("engine-0", "sleep"), ("engine-1", "sleep")]
    pool.bury("engine-1", OSError())
    pool.wake_up(weights_only=True)
    assert (starts(world), pool.postponed) == ([], ["engine-1"])
    pool.wake_up()
    assert (starts(world), pool.postponed) == (["engine-1"], [])
    assert [call[1:] for call in world.calls if call[0] == "engine-1"][-1] == ("start", "make", (), True)
    assert ("engine-0", "wake_up", True) in world.calls
    assert ("engine-0", "wake_up", False) in world.calls
    pool.bury("engine-0", OSError())  # the GPUs are the engines' now
    assert starts(world) == ["engine-1", "engine-0"]


def test_a_successor_wakes_its_weights_for_its_first_publication(world, pool) -> None:
    """The others have woken before. One that cannot is replaced."""
    pool.shares = True
    for name in ("engine-0", "engine-1"):
        pool.bury(name, OSError())
    world.answers |= {("engine-0", "wake_up"): [61.0]}  # the pool waits a minute
    world.now = 50.0
    world.calls.clear()
    assert (pool.newcomers(wait=False), world.now) == (["engine-1"], 110.0)
    assert world.calls[:2] == [("engine-0", "wake_up", True), ("engine-1", "wake_up", True)]
    assert (pool.attempts, list(pool.starting)) == ({"engine-0": 2, "engine-1": 1}, ["engine-0"])


@pytest.mark.parametrize(("timeout_s", "limit"), [(60.0, START_TIMEOUT_S), (2000.0, 2000.0)])
def test_the_learner_gets_its_gpus_when_the_last_successor_sleeps_or_is_ended(
    world, tmp_path, caplog, timeout_s, limit
) -> None:
    world.answers = {"start": [0.0, 0.0, 0.0, 50.0, NEVER]}
    pool = make_pool(tmp_path, 3, timeout_s)
    pool.start()
    for name in ("engine-1", "engine-2"):
        pool.alive.remove(name)
        pool.bury(name, OSError())
    hanging = pool.actors.handles["engine-2"]
    with caplog.at_level(logging.WARNING):
        pool.sleep()
    assert f"the successor of engine-2 did not come up within {limit:.0f} s" in caplog.text
    assert (world.now, world.killed[-1]) == (limit, hanging)
    assert (list(pool.starting), pool.postponed) == (["engine-1"], ["engine-2"])
    assert world.calls[-1] == ("engine-0", "sleep")


def test_an_engine_that_cannot_sleep_or_wake_is_dead(world, pool) -> None:
    world.answers |= {("engine-0", "sleep"): [(1.0, died())], ("engine-1", "wake_up"): [NEVER]}
    pool.sleep()
    assert (pool.alive, list(pool.engines)) == (["engine-1"], ["engine-1"])
    pool.wake_up()
    assert (pool.alive, world.now) == ([], 61.0)


def test_what_an_engine_says_of_itself_is_told_by_name(world, pool) -> None:
    world.answers |= {("engine-0", "place"): [(1.0, "here")], ("engine-1", "place"): [(2.0, "there")]}
    world.answers |= {"peak_memory": [(1.0, {"host": 7})]}
    assert pool.places() == {"engine-0": "here", "engine-1": "there"}
    assert pool.peak_memory() == {"engine-0": {"host": 7}, "engine-1": {"host": 7}}


def test_engines_close_in_order_and_one_that_does_not_is_ended(world, pool) -> None:
    world.answers |= {("engine-1", "close"): [NEVER]}
    pool.close()
    assert world.now == rollout_pool.CLOSE_S
    assert [call[:2] for call in world.calls] == [("engine-0", "close"), ("engine-1", "close")]
    assert world.killed == list(pool.actors.handles.values())


# --- rewards ------------------------------------------------------------------------------------------------


def rollouts(count: int):
    columns = np.zeros(1, np.int64), np.ones(1, bool), np.zeros(1, np.float32), np.zeros(1, np.int32)
    return [(i, Prompt("p", (1,), "q"), Completion(*columns, "stop", str(i))) for i in range(count)]


@pytest.fixture
def rewards(world, tmp_path) -> RayRewardPool:
    return RayRewardPool(RewardConfig(workers=2), tmp_path)


def judged_by(world: VirtualRay) -> list[tuple[str, list[str]]]:
    return [(call[0], [c.text for _, _, c in call[2]]) for call in world.calls if call[1] == "judge"]


def test_only_the_rollouts_of_a_dead_worker_are_judged_again(world, rewards, caplog) -> None:
    """Three rollouts are chunks of two and one. The worker with two dies once."""
    told = Event("restart", "reward process", "ended with 3")
    world.answers = {
        ("reward-0", "judge"): [(5.0, died("killed")), (2.0, (["a", "b"], []))],
        ("reward-1", "judge"): [(1.0, (["c"], [told]))],
    }
    old = rewards.actors.handles["reward-0"]
    with caplog.at_level(logging.WARNING):
        assert rewards.judge(rollouts(3)) == ["a", "b", "c"]
    assert judged_by(world) == [("reward-0", ["0", "1"]), ("reward-1", ["2"]), ("reward-0", ["0", "1"])]
    assert (world.killed, world.now) == ([old], 7.0)
    new = rewards.actors.handles["reward-0"]
    assert new is not old
    assert (new.made, new.options) == (old.made, old.options)
    assert rewards.take_events() == [told, Event("reward_death", "reward-0", "reward-0 died: killed")]
    assert rewards.take_events() == []
    assert "reward-0 is dead, another one judges its rollouts again: reward-0 died: killed" in caplog.text


def test_workers_that_die_again_and_again_end_the_call(world, rewards) -> None:
    """The fifth death is raised. Four were buried before it."""
    world.answers = {"judge": [(1.0, died("killed"))]}
    with pytest.raises(ProcessDied, match="reward-0 died: killed"):
        rewards.judge(rollouts(1))
    assert judged_by(world) == [("reward-0", ["0"])] * DEATHS_IN_A_ROW == [("reward-0", ["0"])] * 5
    assert len(world.killed) == len(rewards.take_events()) == 4


def test_a_closed_pool_starts_nobody_anew(world, rewards) -> None:
    world.answers = {"judge": [(1.0, died("killed"))]}
    rewards.close()
    handles = list(rewards.actors.handles.values())
    assert world.killed == handles
    with pytest.raises(ProcessDied):
        rewards.judge(rollouts(1))
    assert (list(rewards.actors.handles.values()), world.killed) == (handles, handles)


def test_two_rollouts_are_one_for_each_of_two_workers(world, rewards) -> None:
    world.answers = {"judge": [(1.0, (["a"], [])), (1.0, (["b"], []))]}
    assert rewards.judge(rollouts(2)) == ["a", "b"]
    assert judged_by(world) == [("reward-0", ["0"]), ("reward-1", ["1"])]


def test_a_rewards_own_error_is_raised_and_nobody_is_replaced(world, rewards) -> None:
    world.answers = {"judge": [(1.0, raised(RewardError("it raised KeyError")))]}
    with pytest.raises(RewardError, match="it raised KeyError"):
        rewards.judge(rollouts(2))
    assert (world.killed, rewards.take_events(), len(judged_by(world))) == ([], [], 2)


def test_nothing_to_judge_asks_nobody(world, rewards) -> None:
    assert (rewards.judge([]), judged_by(world)) == ([], [])
