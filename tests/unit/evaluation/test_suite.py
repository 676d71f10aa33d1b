"""Laws of an evaluation: its numbers against numbers computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gspo_dist.evaluation.suite import clustered_standard_error, evaluate
from gspo_dist.rewards.exact import exact_match
from gspo_dist.rewards.reward import Judged, RewardError, judge_rollout
from gspo_dist.types import Completion, Prompt, SamplingSpec

PROMPTS = [Prompt(f"p{i}", (i,), f"q{i}", "1") for i in range(3)]
TEXTS = [["1", "0", "0", "1"], ["0", "0", "0", "00"], ["1", "1", "1", "000"]]


def completion(text: str) -> Completion:
    n = len(text)
    reason = "length" if n > 2 else "stop"
    return Completion(
        np.zeros(n, np.int64), np.ones(n, bool), np.zeros(n, np.float32), np.zeros(n, np.int32), reason, text
    )


def generate(prompts, spec):
    assert [p.prompt_id for p in prompts] == ["p0", "p1", "p2"]
    return [[completion(t) for t in row[: spec.n]] for row in TEXTS]


def judge_with(reward=exact_match):
    """A pool's `judge`, in this process."""
    return lambda items: [judge_rollout(reward, prompt, c, rollout) for rollout, prompt, c in items]


def run(n: int = 4, **kwargs):
    return evaluate(generate, judge_with(), PROMPTS, SamplingSpec(n=n, max_tokens=3), **kwargs)


def test_the_numbers_by_hand():
    result = run()
    assert result.accuracy == pytest.approx(5 / 12, abs=1e-15)
    # C(4,2)=6 pairs; without a right one: 1 for p0, 6 for p1, 0 for p2.
    assert result.pass_at == pytest.approx({1: 5 / 12, 2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3}, abs=1e-15)
    assert result.mean_length == (4 + 5 + 6) / 12
    assert result.truncated == 1 / 12
    assert result.reward_mean == pytest.approx(5 / 12, abs=1e-15)
    assert [row.correct for row in result.rows] == [2, 0, 3]
    assert result.rows[2].completions == ("1", "1", "1", "000")
    assert result.rows[2].finish_reasons == ("stop", "stop", "stop", "length")


def test_the_standard_error_is_that_of_a_mean_over_prompts():
    means = np.array([2, 0, 3]) / 4
    assert run().standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(3), rel=1e-12)


def test_two_prompts_have_a_standard_error_and_one_has_none():
    assert clustered_standard_error([0.0, 1.0]) == 0.5  # sqrt((0.25 + 0.25) / (2 * 1))
    assert math.isnan(clustered_standard_error([1.0]))


def test_siblings_that_agree_add_no_certainty():
    once = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert clustered_standard_error(once) == pytest.approx(np.std(once, ddof=1) / math.sqrt(5), rel=1e-12)
    copies = [[completion(str(int(m)))] * 8 for m in once]
    prompts = [Prompt(str(i), (i,), "q", "1") for i in range(5)]
    result = evaluate(lambda p, s: copies, judge_with(), prompts, SamplingSpec(n=8, max_tokens=3))
    assert result.standard_error == pytest.approx(clustered_standard_error(once), rel=1e-12)


def test_metric_names():
    result = run(2, suite="aime24")
    assert set(result.metrics()) == {
        "eval/aime24/avg@2",
        "eval/aime24/avg@2_standard_error",
        "eval/aime24/pass@1",
        "eval/aime24/pass@2",
        "eval/aime24/reward_mean",
        "eval/aime24/completion_length_mean_tokens",
        "eval/aime24/truncated_fraction",
    }
    assert result.metrics()["eval/aime24/avg@2"] == result.accuracy


def test_what_is_not_defined_is_no_metric():
    one = [[completion("1")]]
    result = evaluate(lambda p, s: one, judge_with(), PROMPTS[:1], SamplingSpec(n=1, max_tokens=3))
    assert math.isnan(result.standard_error)
    assert "eval/heldout/avg@1_standard_error" not in result.metrics()
    assert result.metrics()["eval/heldout/avg@1"] == 1.0


def test_right_means_a_reward_of_correct_at_or_more():
    def half(prompt, completion):
        return (0.5, {}) if completion.text == "1" else -1.0

    spec = SamplingSpec(n=4, max_tokens=3)
    assert evaluate(generate, judge_with(half), PROMPTS, spec).accuracy == 0.0
    assert evaluate(generate, judge_with(half), PROMPTS, spec, correct_at=0.5).accuracy == pytest.approx(
        5 / 12, abs=1e-15
    )
    assert evaluate(generate, judge_with(half), PROMPTS, spec).reward_mean == pytest.approx(
        (5 * 0.5 - 7) / 12, abs=1e-15
    )


def test_missing_completions_are_an_error():
    with pytest.raises(
        ValueError, match=r"generate must give 5 completions for each of 3 prompts: got 3 groups of \[4\]"
    ):
        run(5)


def test_no_prompts_are_an_error():
    with pytest.raises(ValueError, match="must have at least one prompt"):
        evaluate(generate, judge_with(), [], SamplingSpec(n=1, max_tokens=1))


def test_a_reward_that_is_no_number_names_the_prompt():
    with pytest.raises(
        RewardError, match=r"reward of a held-out completion \(prompt p0\) must be a finite number: got nan"
    ):
        evaluate(generate, judge_with(lambda p, c: math.nan), PROMPTS, SamplingSpec(n=4, max_tokens=3))


def test_every_row_holds_its_own_prompts_rewards():
    """Judged in one call, split by prompt."""
    calls = []

    def judge(items):
        calls.append([(rollout, prompt.prompt_id) for rollout, prompt, _ in items])
        return [Judged(float(i), {}) for i in range(len(items))]

    result = evaluate(generate, judge, PROMPTS, SamplingSpec(n=2, max_tokens=3), correct_at=3.0)
    assert calls == [[(-1, "p0"), (-1, "p0"), (-1, "p1"), (-1, "p1"), (-1, "p2"), (-1, "p2")]]
    assert [row.rewards for row in result.rows] == [(0.0, 1.0), (2.0, 3.0), (4.0, 5.0)]
    assert [row.correct for row in result.rows] == [0, 1, 2]
    row = result.rows[1]
    assert (row.prompt_id, row.prompt, row.answer, row.lengths) == ("p1", "q1", "1", (1, 1))


def test_a_group_too_few_is_an_error():
    with pytest.raises(ValueError, match=r"4 completions for each of 3 prompts: got 2 groups of \[4\]"):
        evaluate(lambda p, s: generate(p, s)[:2], judge_with(), PROMPTS, SamplingSpec(n=4, max_tokens=3))


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4])])
def test_which_k_pass_at_k_is_given_for(n, ks):
    assert list(run(n).pass_at) == ks
