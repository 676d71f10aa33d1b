"""Small terms, and what combines them, with numbers worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import judge_rollout, resolve_reward
from gspo_dist.types import Completion, Prompt


def completion(text: str, tokens: int = 1) -> Completion:
    ones = np.ones(tokens)
    return Completion(ones, ones, ones, ones, "stop", text)


def judged(function: str, text: str, tokens: int = 1, answer=None, metadata=None, **options):
    reward = resolve_reward(RewardConfig(function=function, options=options))
    prompt = Prompt("p", (1,), "q", answer, metadata or {})
    return judge_rollout(reward, prompt, completion(text, tokens), 0)


@pytest.mark.parametrize(
    ("tokens", "reward"), [(1, 0), (16384, 0), (18432, -0.5), (20480, -1), (99999, -1), (16385, -1 / 4096)]
)
def test_dapos_soft_overlong_penalty(tokens, reward):
    assert judged("overlong", "x", tokens, max_tokens=20480, cache=4096).reward == pytest.approx(
        reward, abs=1e-12
    )


@pytest.mark.parametrize(
    ("text", "whole", "shares"),
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1, 1),
        ("<think>a</think><answer>b</answer>", 1, 1),
        ("<think>a</think><answer>b", 0, 0.75),
        ("<think>a</think>x<answer>b</answer>", 0, 1),
        ("<answer>b</answer><think>a</think>", 0, 1),
        ("<think>a</think><think>a</think><answer>b</answer>", 0, 0.5),
        ("b", 0, 0),
    ],
)
def test_format(text, whole, shares):
    assert judged("format", text).reward == whole
    assert judged("format", text, shares=True).reward == shares


def test_regex_and_length():
    assert judged("regex", "a\nb 12", pattern=r"b \d+$").reward == 1
    assert judged("regex", "a\nb 12", pattern=r"b \d+", whole=True).reward == 0
    assert [judged("length", "a bc", n, least=2, most=3).reward for n in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert judged("length", "a bc", 9, most=2, unit="words").reward == 1
    assert judged("length", "a bc", 1, most=3, unit="characters").reward == 0


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("overlong", {"max_tokens": 4, "cache": 8}, "reward.options.max_tokens must be at least 8: got 4"),
        ("overlong", {"max_tokens": 4, "cache": 0}, "reward.options.cache must be above 0: got 0"),
        ("regex", {"pattern": "("}, "reward.options.pattern must be a regular expression"),
        ("regex", {"pattern": "a", "whole": 1}, "reward.options.whole must be true or false: got 1"),
        ("format", {"tags": "think"}, "reward.options.tags must be a list of names: got 'think'"),
        ("format", {"shares": 2}, "reward.options.shares must be true or false: got 2"),
        ("length", {"most": 1, "least": 2}, "reward.options.most must be at least 2: got 1"),
        ("length", {"most": 1, "unit": "lines"}, "reward.options.unit must be a known name: got 'lines'"),
    ],
)
def test_options_without_meaning_are_refused(function, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve_reward(RewardConfig(function=function, options=options))
