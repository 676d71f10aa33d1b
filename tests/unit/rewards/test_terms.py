"""Small terms, and what combines them, with numbers worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import RewardError, check_answers, judge_rollout, resolve_reward
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


TERMS = {
    "right": {"function": "exact_match", "options": {"pattern": r"<answer>(.*)</answer>"}},
    "shape": {"function": "format", "weight": 0.1},
    "long": {"function": "overlong", "options": {"max_tokens": 10, "cache": 4}, "weight": 2},
}


def test_a_weighted_sum_with_every_part():
    text = "<think>a</think><answer>42</answer>"
    verdict = judged("weighted_sum", text, tokens=8, answer="42", terms=TERMS)
    assert verdict.reward == pytest.approx(1 + 0.1 - 2 * 0.5)
    assert verdict.parts == {"right": 1.0, "right/answered": 1.0, "shape": 1.0, "long": -0.5}
    verdict = judged("weighted_sum", "42", tokens=1, answer="42", terms=TERMS)
    assert (verdict.reward, verdict.parts["right/answered"]) == (0.0, 0.0)


def test_a_gate_multiplies_and_spares_the_rest():
    terms = {"right": TERMS["right"], "shape": {"function": "format", "gate": True}}
    assert judged("weighted_sum", "<think>a</think><answer>42</answer>", answer="42", terms=terms).reward == 1
    verdict = judged("weighted_sum", "<answer>42</answer>", answer="42", terms=terms)
    assert verdict == (0.0, {"shape": 0.0})


def test_the_reward_of_each_source():
    sources = {
        "openai/*": {"function": "math"},
        "*": {"function": "exact_match", "options": {"ignore_case": True}},
    }
    verdict = judged(
        "by_source", r"\boxed{0.5}", answer="1/2", metadata={"data_source": "openai/gsm8k"}, sources=sources
    )
    assert verdict == (1.0, {"answered": 1.0, "openai/*/share": 1.0, "openai/*/reward": 1.0})
    verdict = judged("by_source", "YES", answer="yes", metadata={"data_source": "words"}, sources=sources)
    assert (verdict.reward, verdict.parts["*/share"]) == (1.0, 1.0)
    config = RewardConfig(function="by_source", options={"sources": {"openai/*": {"function": "math"}}})
    good = Prompt("a.jsonl:1", (1,), "q", "7", {"data_source": "openai/gsm8k"})
    check_answers(config, [good])
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: .*must have a pattern for every record's data_source: got 'x'"
    ):
        check_answers(config, [good, Prompt("a.jsonl:2", (1,), "q", "7", {"data_source": "x"})])
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*must be a mathematical expression"):
        check_answers(config, [Prompt("a.jsonl:3", (1,), "q", "}", {"data_source": "openai/gsm8k"})])


def test_the_terms_of_a_sum_check_the_data():
    config = RewardConfig(function="weighted_sum", options={"terms": {"right": {"function": "math"}}})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*must be a mathematical expression"):
        check_answers(config, [Prompt("a.jsonl:1", (1,), "q", "}")])


def test_sums_may_hold_rewards_of_ones_own_of_every_kind(reward_file):
    path = reward_file(
        "async def later(prompt, completion, *, bonus=0): return 0.25 + bonus\n"
        "def many(prompts, completions): return [(0.5, {'n': len(prompts)}) for _ in prompts]\n"
    )
    terms = {
        "a": {"function": f"{path}:later", "options": {"bonus": 1}},
        "b": {"function": f"{path}:many", "weight": 2},
    }
    assert judged("weighted_sum", "x", terms=terms) == (2.25, {"a": 1.25, "b": 0.5, "b/n": 1.0})


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
        ("weighted_sum", {"terms": {}}, "reward.options.terms must be a mapping"),
        ("weighted_sum", {"terms": {"a": {}}}, "reward.options.terms.a must have a function: got {}"),
        ("weighted_sum", {"terms": {"a": {"function": "math", "weights": 1}}}, "did you mean 'weight'"),
        (
            "weighted_sum",
            {"terms": {"a": {"function": "maths"}}},
            "terms.a: reward.function must be a built-in name",
        ),
        (
            "weighted_sum",
            {"terms": {"a": {"function": "math", "weight": "1"}}},
            "a.weight must be a number: got '1'",
        ),
        (
            "weighted_sum",
            {"terms": {"a": {"function": "math", "gate": 1}}},
            "a.gate must be true or false: got 1",
        ),
        (
            "weighted_sum",
            {"terms": {"a": {"function": "math", "gate": True}}},
            "must have a term that is no gate",
        ),
        ("by_source", {"sources": {"a": {"function": "math", "weight": 1}}}, "sources.a has no key 'weight'"),
        (
            "by_source",
            {"sources": {"a": {"function": "math"}}, "field": ""},
            "field must be the name of a column",
        ),
    ],
)
def test_options_without_meaning_are_refused(function, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve_reward(RewardConfig(function=function, options=options))


def test_a_term_that_raises_names_the_rollout(reward_file):
    path = reward_file("def f(prompt, completion): raise KeyError('gold')")
    with pytest.raises(RewardError, match=r"reward of rollout 0 \(prompt p\) raised KeyError: 'gold'"):
        judged("weighted_sum", "x", terms={"a": {"function": f"{path}:f"}})
