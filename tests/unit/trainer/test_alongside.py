"""Work beside the learner: it lasts as long as the learner's block, and no error of it gets lost."""

from __future__ import annotations

import threading

import pytest

from gspo_dist.trainer.alongside import alongside


def test_the_work_runs_in_a_thread_of_its_own_until_the_block_is_over_and_is_waited_for():
    begun, seen = threading.Event(), []

    def work(is_over):
        seen.append((threading.current_thread().name, is_over()))
        begun.set()
        while not is_over():
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)  # the slice under way
        seen.append("ended")

    with alongside("engines", work):
        assert begun.wait(10)
        assert seen == [("engines", False)]
    assert seen == [("engines", False), "ended"]


def test_what_the_work_raises_is_raised_after_the_block_and_not_in_it():
    learned = []

    def work(is_over):
        raise KeyError("engine")

    def block():
        with alongside("engines", work):
            learned.append(1)

    with pytest.raises(KeyError, match="engine"):
        block()
    assert learned == [1]


def test_what_the_block_raises_is_not_hidden_by_the_work_and_ends_it():
    seen = []

    def work(is_over):
        while not is_over():
            threading.Event().wait(0.001)
        seen.append(is_over())
        raise KeyError("engine")

    with pytest.raises(FloatingPointError), alongside("engines", work):
        raise FloatingPointError("loss")
    assert seen == [True]
