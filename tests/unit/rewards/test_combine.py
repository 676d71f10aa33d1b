"""Rewards made of others: sums, gates, and another reward for each source, numbers by hand."""

from __future__ import annotations

import re

import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import RewardError, check_answers, resolve_reward
from gspo_dist.types import Prompt
from tests.unit.rewards.test_terms import completion, judged

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


@pytest.fixture
def shares(reward_file):
    """The reward file:f gives what its option says; of(...) is a term of it."""
    path = reward_file("def f(prompt, completion, *, value, of=None): return value, {'v': value}")

    def of(value: float, **more):
        return {"function": f"{path}:f", "options": {"value": value}, **more}

    return of


def test_weights_gates_and_their_defaults(shares):
    """(2 x 3 + 5) x 0.5 x 0.25. Gates come first; the others keep their order."""
    terms = {
        "a": shares(3.0, weight=2),
        "half": shares(0.5, gate=True),
        "b": shares(5.0, gate=False),
        "quarter": shares(0.25, gate=True),
    }
    verdict = judged("weighted_sum", "x", terms=terms)
    assert verdict.reward == 1.375
    assert list(verdict.parts) == [f"{n}{v}" for n in ("half", "quarter", "a", "b") for v in ("", "/v")]
    assert [verdict.parts[n] for n in terms] == [3.0, 0.5, 5.0, 0.25]


def test_only_a_gate_that_gives_0_spares_what_follows(shares):
    terms = {"zero": shares(0.0), "one": shares(1.0), "shut": shares(0.0, gate=True)}
    assert judged("weighted_sum", "x", terms=terms) == (0.0, {"shut": 0.0, "shut/v": 0.0})
    del terms["shut"]
    assert judged("weighted_sum", "x", terms=terms).parts == {"zero": 0, "zero/v": 0, "one": 1, "one/v": 1}


def test_options_reach_a_term_as_they_are(reward_file):
    """Also keys that are no texts; a term without options, or with none, has the function's own."""
    path = reward_file("def f(prompt, completion, *, table={7: 2.0}): return table[7]")
    terms = {
        "given": {"function": f"{path}:f", "options": {"table": {7: 0.5}}},
        "own": {"function": f"{path}:f"},
        "none": {"function": f"{path}:f", "options": None},
    }
    assert judged("weighted_sum", "x", terms=terms) == (4.5, {"given": 0.5, "own": 2.0, "none": 2.0})


def test_a_term_is_looked_up_once(reward_file, monkeypatch):
    from gspo_dist.rewards import reward

    path = reward_file("def f(prompt, completion, *, value): return value")
    terms = {n: {"function": f"{path}:f", "options": {"value": v}} for n, v in (("a", 1), ("b", 2))}
    summed = resolve_reward(RewardConfig(function="weighted_sum", options={"terms": terms}))
    looked_up = []
    real = reward.resolve_reward
    monkeypatch.setattr(reward, "resolve_reward", lambda config: (looked_up.append(config), real(config))[1])
    for _ in range(3):
        assert summed(Prompt("p", (1,), "q", None), completion("x")) == (3.0, {"a": 1.0, "b": 2.0})
    assert looked_up == [RewardConfig(function=f"{path}:f", options={"value": v}) for v in (1, 2)]


@pytest.mark.parametrize(
    ("metadata", "pattern"),
    [
        ({"data_source": "openai/gsm8k"}, "openai/g*"),
        ({"data_source": "openai/other"}, "openai/*"),
        ({"data_source": "OpenAI/gsm8k"}, "*"),  # capitals count
        ({"data_source": 7}, "7"),
        ({"other": 7}, ""),
    ],
)
def test_the_first_pattern_that_fits_is_taken(shares, metadata, pattern):
    patterns = ["openai/g*", "openai/*", "7", "", "*"]
    sources = {name: shares(float(at)) for at, name in enumerate(patterns)}
    at = patterns.index(pattern)
    assert judged("by_source", "x", metadata=metadata, sources=sources) == (
        at,
        {"v": at, f"{pattern}/share": 1.0, f"{pattern}/reward": at},
    )


def test_the_column_of_the_source_may_have_another_name(shares):
    sources = {"a": shares(1.0), "b": shares(2.0)}
    verdict = judged(
        "by_source", "x", metadata={"data_source": "a", "kind": "b"}, sources=sources, field="kind"
    )
    assert verdict.reward == 2.0


def test_a_source_without_a_pattern_is_told_the_nearest(shares):
    config = RewardConfig(function="by_source", options={"sources": {"gsm8k": shares(1.0)}})
    with pytest.raises(
        ValueError,
        match=re.escape(
            "reward.options.sources must have a pattern for every record's data_source: got 'gsm8'; "
            "did you mean 'gsm8k'? known: gsm8k; \"*\" fits the rest"
        ),
    ):
        check_answers(config, [Prompt("a.jsonl:1", (1,), "q", None, {"data_source": "gsm8"})])


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
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
        (
            "weighted_sum",
            {"terms": ["a"]},
            "to {function, options, weight, gate}: got ['a']",
        ),
        ("weighted_sum", {"terms": {"a": "math"}}, "reward.options.terms.a must have a function: got 'math'"),
        ("weighted_sum", {"terms": {"a": "function"}}, "terms.a must have a function: got 'function'"),
        (
            "weighted_sum",
            {"terms": {"a": {"function": "math", "weight": True}}},
            "reward.options.terms.a.weight must be a number: got True",
        ),
        (
            "by_source",
            {"sources": {}},
            "options.sources must be a mapping of names to {function, options}: got {}",
        ),
        ("by_source", {"sources": {"a": {"function": "math"}}, "field": 3}, "name of a column: got 3"),
    ],
)
def test_options_without_meaning_are_refused(function, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve_reward(RewardConfig(function=function, options=options))


@pytest.mark.parametrize("weight", [2, -0.5, 0])
def test_a_weight_is_any_number(shares, weight):
    assert judged("weighted_sum", "x", terms={"a": shares(4.0, weight=weight)}).reward == 4 * weight


def test_a_term_that_raises_names_the_rollout(reward_file):
    path = reward_file("def f(prompt, completion): raise KeyError('gold')")
    with pytest.raises(RewardError, match=r"reward of rollout 0 \(prompt p\) raised KeyError: 'gold'"):
        judged("weighted_sum", "x", terms={"a": {"function": f"{path}:f"}})
