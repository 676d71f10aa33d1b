"""Laws of the mathematical reward: verdicts, options, and answers that are refused."""

from __future__ import annotations

import signal
import sys
import threading
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards import math as module
from gspo_dist.rewards.math import check_answer, check_options, math
from gspo_dist.rewards.reward import resolve_reward
from gspo_dist.rewards.symbolic import math_verify
from gspo_dist.types import Completion, Prompt


def judge(text: str, answer: object, **options) -> tuple[float, dict[str, float]]:
    empty = np.zeros(0)
    return math(
        Prompt("p", (1,), "q", answer), Completion(empty, empty, empty, empty, "stop", text), **options
    )


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("33", r"so \boxed{033}", 1.0),
        (33, "Answer: 33", 1.0),
        ("33", "Answer: 34", 0.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        ("1/2", r"\boxed{\frac12}", 1.0),
        ("x+1", r"\boxed{1+x}", 1.0),
        ("x+1", r"\boxed{x-1}", 0.0),
        (r"$\sqrt{2}$", r"\boxed{\sqrt{2}}", 1.0),
        (r"\boxed{7}", "the answer is 7", 1.0),
        ("1,000", r"\boxed{1000}", 1.0),
        ("1,000+x", r"\boxed{x+1000}", 1.0),
        ("1,000+x", r"\boxed{x+1001}", 0.0),
        (r"5\text{ cm}", r"\boxed{5\text{ cm}}", 1.0),
        (r"5\text{ cm}", r"\boxed{5\text{ kg}}", 0.0),
        ("12", "first 12, then\n13", 0.0),
        ("12", r"\boxed{12} and then some\n13", 1.0),
        ("-5", "**Final Answer:** $-5$", 1.0),
        (["1/3", "x"], r"\boxed{\frac{1}{3}}", 1.0),
        (["1/3", "x"], r"\boxed{x}", 1.0),
        (["1/3", "x"], r"\boxed{y}", 0.0),
        (r"\(\frac{1}{2}\)", r"\boxed{0.5}", 1.0),
        (r"\[3\]", r"\boxed{3}", 1.0),
        (r"\infty", r"\boxed{+\infty}", 1.0),
        (r"\infty", r"\boxed{-\infty}", 0.0),
        ("Lisa", r"\boxed{Linda}", 0.0),
        ("2x-y=1", r"\boxed{y=2x-1}", 1.0),
        ("2x-y=1", r"\boxed{2x-y=5}", 0.0),
        ("2x-y=1", r"\boxed{1=1}", 0.0),
    ],
)
def test_verdicts(answer, text, reward):
    assert judge(text, answer) == (reward, {"answered": 1.0})


def test_it_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(judge(r"\boxed{\frac{2}{4}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [(1.0, {"answered": 1.0})]


def test_boxed_only_reads_no_last_line():
    assert judge("42", "42", boxed_only=True) == (0.0, {"answered": 0.0})
    assert judge(r"\boxed{42}", "42", boxed_only=True) == (1.0, {"answered": 1.0})


def test_no_answer_is_worth_nothing():
    assert judge("", "42") == (0.0, {"answered": 0.0})


def test_a_gold_answer_that_is_no_mathematics_is_the_datas_fault():
    with pytest.raises(ValueError, match="the prompt's answer must be a mathematical expression: got ''"):
        judge("42", "")


@pytest.mark.parametrize("answer", ["33", 33, 0.5, "1/2", r"\frac{1}{2}", "x+1", ["1/2", 7]])
def test_answers_that_are_mathematics_pass(answer):
    check_answer(answer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("}", "must be a mathematical expression: got '}'"),
        (["7", "}"], "must be a mathematical expression: got '}'"),
        ({"value": "2"}, "got a mapping with the fields value"),
        ("", "got the empty text"),
    ],
)
def test_answers_that_are_no_mathematics_are_refused_at_load(answer, words):
    with pytest.raises(ValueError, match=words):
        check_answer(answer)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_boxed_only_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"reward.options.boxed_only must be true or false: got {value!r}"):
        resolve_reward(RewardConfig(function="math", options={"boxed_only": value}))
    resolve_reward(RewardConfig(function="math"))
    resolve_reward(RewardConfig(function="math", options={"boxed_only": True}))


def test_without_the_verifier_the_options_are_refused_with_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_verify.cache_clear()
    with pytest.raises(ValueError, match=r"needs math-verify: pip install 'gspo-dist\[math\]'"):
        resolve_reward(RewardConfig(function="math"))
    monkeypatch.undo()
    assert judge("42", "42") == (1.0, {"answered": 1.0})


@pytest.mark.parametrize("deadline_s", [0, -1.0, 1e9, float("nan"), "5", True, None])
def test_a_deadline_is_a_number_of_seconds(deadline_s):
    with pytest.raises(ValueError, match=r"reward\.options\.deadline_s must be seconds above 0: got"):
        check_options(boxed_only=False, deadline_s=deadline_s)
    for fine in (1e-3, 5, 1e8):
        check_options(boxed_only=False, deadline_s=fine)


def test_no_alarm_is_left_behind():
    """One that went off later would end whatever else this process computes then."""
    before = signal.getsignal(signal.SIGVTALRM)
    assert judge(r"\boxed{1+x}", "x+1", deadline_s=30.0)[0] == 1.0
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == before


@pytest.mark.parametrize("deadline_s", [0.02, None])
def test_what_is_not_compared_in_time_is_undecided_and_scores_nothing(monkeypatch, deadline_s):
    """Computing for ever; without a word the deadline is 5 s, which this test does not wait for."""
    set_for = []
    own = vars(signal) | {"setitimer": lambda clock, seconds: set_for.append(seconds)}
    monkeypatch.setattr(module, "signal", SimpleNamespace(**own))
    judge(r"\boxed{1+x}", "x+1", **({} if deadline_s is None else {"deadline_s": deadline_s}))
    assert set_for == [deadline_s or 5.0, 0]
    monkeypatch.undo()
    monkeypatch.setattr(module, "equal", lambda gold, found: next(n for n in count() if n < 0))
    if deadline_s is not None:
        assert judge(r"\boxed{1+x}", "x+1", deadline_s=deadline_s) == (
            0.0,
            {"answered": 1.0, "undecided": 1.0},
        )


def test_the_right_answer_of_a_solution_is_what_follows_its_last_mark():
    assert judge("18", "First #### 3\n#### 3\nThen\n#### 18") == (1.0, {"answered": 1.0})
    assert judge("3", "First #### 3\n#### 3\nThen\n#### 18") == (0.0, {"answered": 1.0})
