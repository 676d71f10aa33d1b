"""Judging beside the engines: one list at a time, nobody waits for it, nothing is judged twice or lost."""

from __future__ import annotations

import threading

import pytest

from gspo_dist.rewards.reward import Judged, RewardError
from gspo_dist.trainer.judging import Judging
from tests.unit.trainer.test_buffer import begun, completion


class Judge:
    """Gives its verdicts when it is let."""

    def __init__(self):
        self.may, self.asked, self.threads = threading.Event(), [], []

    def __call__(self, items):
        self.threads.append(threading.current_thread().name)
        self.asked.append([i for i, _, _ in items])
        assert self.may.wait(10)
        return [Judged(float(i), {}) for i, _, _ in items]


@pytest.fixture
def judge():
    judge = Judge()
    yield judge
    judge.may.set()


def test_verdicts_come_without_anybody_waiting_and_each_completion_is_judged_once(judge):
    one, two = begun(0), begun(2)
    one.finished = {(0, 1): completion(0)}
    two.finished = {(2, 0): completion(1)}
    judging = Judging(judge)
    judging.go_on([one, two])
    one.finished[1, 0] = completion(2)
    judging.go_on([one, two])  # the first list is under way: nothing happens
    assert judge.asked == [[1]]
    assert one.verdicts == {}
    judge.may.set()
    judging.finish()
    assert one.verdicts == {(0, 1): Judged(1.0, {})}
    judging.go_on([one, two])
    judging.finish()
    judging.go_on([one, two])
    judging.finish()
    judging.go_on([one, two])  # everything has its verdict
    assert judging.under_way is None
    assert judge.asked == [[1], [2], [4]]  # the older step first
    assert one.verdicts[1, 0] == Judged(2.0, {})
    assert two.verdicts == {(2, 0): Judged(4.0, {})}
    assert set(judge.threads) == {"judging_0"}


def test_verdicts_that_have_come_are_noted_on_the_next_look(judge):
    step = begun(0)
    step.finished = {(0, 0): completion(0)}
    judging = Judging(judge)
    judging.go_on([step])
    judge.may.set()
    judging.under_way[2].result(10)
    assert step.verdicts == {}  # only the caller's thread changes a step
    judging.go_on([step])
    assert step.verdicts == {(0, 0): Judged(0.0, {})}
    assert judging.under_way is None


@pytest.mark.parametrize("noticed_by", ["go_on", "finish"])
def test_what_the_judge_raises_is_raised_once(noticed_by):
    def broken(items):
        raise RewardError("the service is down")

    step = begun(0)
    step.finished = {(0, 0): completion(0)}
    judging = Judging(broken)
    judging.go_on([step])
    judging.under_way[2].exception(10)
    with pytest.raises(RewardError, match="the service is down"):
        judging.go_on([step]) if noticed_by == "go_on" else judging.finish()
    assert judging.under_way is None
    judging.finish()
    assert step.verdicts == {}
