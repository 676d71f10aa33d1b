"""Laws of resolving and calling rewards: bad names are refused before a run, failures name their rollout."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.reward import (
    Judged,
    RewardError,
    answer_check,
    check_answers,
    judge_rollout,
    located,
    resolve_reward,
)
from gspo_dist.types import Completion, Prompt

PROMPT = Prompt("p7", (1, 2), "1+2=", "3")


def completion(text: str) -> Completion:
    n = len(text)
    return Completion(
        np.zeros(n, np.int64), np.ones(n, bool), np.zeros(n, np.float32), np.zeros(n, np.int32), "stop", text
    )


def test_built_in_names_resolve_and_judge():
    for name in ("exact_match", "math"):
        fn = resolve_reward(RewardConfig(function=name))
        assert judge_rollout(fn, PROMPT, completion("3"), 0).reward == 1.0
        assert judge_rollout(fn, PROMPT, completion("4"), 0).reward == 0.0


def test_options_are_bound():
    fn = resolve_reward(RewardConfig(options={"pattern": r"#(\d+)$"}))
    assert fn(PROMPT, completion("4#3")) == (1.0, {"answered": 1.0})


def test_a_function_of_a_file_with_its_options_and_parts(reward_file):
    path = reward_file(
        "def f(prompt, completion, *, bonus=0.0):\n    return bonus, {'length': len(completion.text)}\n"
    )
    fn = resolve_reward(RewardConfig(function=f"{path}:f", options={"bonus": 0.5}))
    assert judge_rollout(fn, PROMPT, completion("abcd"), 0) == Judged(0.5, {"length": 4.0})


def test_a_function_of_a_module(reward_file, monkeypatch, tmp_path):
    reward_file("def f(prompt, completion):\n    return 0.25\n", "my_rewards_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    fn = resolve_reward(RewardConfig(function="my_rewards_module:f"))
    assert judge_rollout(fn, PROMPT, completion(""), 0) == Judged(0.25, {})


def test_only_functions_are_offered_for_a_wrong_name(reward_file):
    path = reward_file("LIMIT = 1\ndef _own(p, c): return 1\ndef other(p, c): return 1\n")
    with pytest.raises(ValueError, match=r"has no 'judge'; known: other$"):
        resolve_reward(RewardConfig(function=f"{path}:judge"))


def test_two_files_of_one_name_are_two_modules(reward_file, tmp_path):
    (tmp_path / "other").mkdir()
    one = reward_file("def f(prompt, completion):\n    return 1\n")
    two = reward_file("def f(prompt, completion):\n    return 2\n", "other/reward.py")
    rewards = [resolve_reward(RewardConfig(function=f"{p}:f"))(PROMPT, completion("")) for p in (one, two)]
    assert rewards == [1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "did you mean 'exact_match'?"),
        ("no.such.package:f", "cannot import no.such.package"),
        ("gspo_dist.rewards.exact:exact_mach", "has no 'exact_mach'; did you mean 'exact_match'?"),
        ("/nowhere/reward.py:f", "no such file: /nowhere/reward.py"),
        (
            "gspo_dist.rewards.reward:Judged",
            "must be a function (prompt, completion, *, options): got the class Judged",
        ),
        ("gspo_dist.rewards.reward:BUILT_IN", "must be a function (prompt, completion, *, options): got {"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_reward(RewardConfig(function=name))


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ("def f(prompt): return 1", {}, "its signature is (prompt)"),
        ("def f(prompt, completion, tokenizer): return 1", {}, "missing a required argument: 'tokenizer'"),
        ("def f(*, prompt, completion): return 1", {}, "too many positional arguments"),
        (
            "def f(prompt, completion, *, bonus=1): return 1",
            {"bonsu": 2},
            "has no option 'bonsu'; did you mean 'bonus'?",
        ),
        ("def f(prompt, completion): return 1", {"prompt": 2}, "has no option 'prompt'"),
        (
            "def f(prompts, completions, more): return 1",
            {},
            "must be a function (prompts, completions, *, opt",
        ),
        ("raise RuntimeError('no key')", {}, "raised RuntimeError: no key"),
        ("def f(prompt, completion) return 1", {}, "raised SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_up_front(reward_file, body, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_reward(RewardConfig(function=reward_file(body) + ":f", options=options))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("exact_match", {"pattern": "(3"}, "reward.options.pattern must be a regular expression: got '(3'"),
        ("exact_match", {"strip": "no"}, "reward.options.strip must be true or false: got 'no'"),
        ("math", {"boxed_only": 1}, "reward.options.boxed_only must be true or false: got 1"),
        ("exact_match", {"patterns": "3"}, "exact_match has no option 'patterns'; did you mean 'pattern'?"),
    ],
)
def test_option_values_without_meaning_are_refused(function, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_reward(RewardConfig(function=function, options=options))


def test_a_built_in_reward_checks_the_answers_of_the_data():
    for name in ("exact_match", "math"):
        check = answer_check(RewardConfig(function=name))
        check("3")
        with pytest.raises(ValueError, match="got a mapping with the fields value"):
            check({"value": "3"})


def test_a_reward_of_ones_own_may_check_answers(reward_file):
    path = reward_file(
        "def f(p, c): return 1\n"
        "def g(p, c): return 1\n"
        "def check(answer):\n"
        "    if answer < 0: raise ValueError('below 0')\n"
        "f.check_answer = check\n"
    )
    check = answer_check(RewardConfig(function=f"{path}:f"))
    check(1)
    with pytest.raises(ValueError, match=r"^below 0$"):
        check(-1)
    answer_check(RewardConfig(function=f"{path}:g"))(-1)  # it has none
    with pytest.raises(ValueError, match="has no 'h'"):
        answer_check(RewardConfig(function=f"{path}:h"))
    with pytest.raises(ValueError, match=r"did you mean 'exact_match'\?"):
        answer_check(RewardConfig(function="exact_mach"))


def test_the_first_answer_that_cannot_be_read_is_named_with_its_place():
    answers = ["4", {"value": "2"}, None]
    prompts = [Prompt(f"data.jsonl:{i}", (1,), "q", answer) for i, answer in enumerate(answers)]
    check_answers(RewardConfig(), prompts[:1])
    words = r"^data\.jsonl:1: reward\.function exact_match cannot read the answer: .*mapping"
    with pytest.raises(ValueError, match=words):
        check_answers(RewardConfig(), prompts)


def test_a_module_that_fails_to_import_is_named(reward_file, monkeypatch, tmp_path):
    for body, words in (("exit(3)", "raised SystemExit: 3"), ("1/0", "raised ZeroDivisionError")):
        reward_file(body, "broken_rewards_module.py")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match=f"reward.function 'broken_rewards_module:f': .* {words}"):
            resolve_reward(RewardConfig(function="broken_rewards_module:f"))


def test_an_exception_names_the_rollout_and_keeps_its_cause():
    def broken(prompt, completion):
        return {}["gold"]

    with pytest.raises(
        RewardError, match=r"reward of rollout 41 \(prompt p7\) raised KeyError: 'gold'"
    ) as caught:
        judge_rollout(broken, PROMPT, completion("3"), 41)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "1.0", [1.0, 2.0], (1.0, {}, 0)])
def test_what_is_no_finite_number_is_refused(bad):
    with pytest.raises(RewardError, match=r"reward of rollout 3 \(prompt p7\) must be a finite number: got"):
        judge_rollout(lambda p, c: bad, PROMPT, completion("3"), 3)


def test_exit_is_a_failure_that_names_the_rollout():
    def leave(prompt, completion):
        exit(3)

    with pytest.raises(RewardError, match=r"reward of rollout 41 \(prompt p7\) called exit\(3\)"):
        judge_rollout(leave, PROMPT, completion("3"), 41)


def test_a_held_out_completion_is_no_rollout():
    with pytest.raises(RewardError, match=r"reward of a held-out completion \(prompt p7\) must be a finite"):
        judge_rollout(lambda p, c: None, PROMPT, completion("3"), -1)


def test_only_the_path_of_a_file_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RewardConfig(function="rewards/mine.py:f", options={"a": 1}, timeout_s=3.0)
    assert located(config) == RewardConfig(
        function=f"{tmp_path}/rewards/mine.py:f", options={"a": 1}, timeout_s=3.0
    )
    for name in ("exact_match", "package.module:f"):
        assert located(RewardConfig(function=name)).function == name


def test_parts_must_be_named_finite_numbers():
    with pytest.raises(
        RewardError, match=r"rollout 3 \(prompt p7\), part 'length' must be a finite number: got nan"
    ):
        judge_rollout(lambda p, c: (1.0, {"length": math.nan}), PROMPT, completion("3"), 3)
    with pytest.raises(RewardError, match=r"its parts must be a mapping of names to numbers: got 0\.5"):
        judge_rollout(lambda p, c: (1.0, 0.5), PROMPT, completion("3"), 3)


def test_the_first_rollout_has_the_number_zero():
    with pytest.raises(RewardError, match="reward of rollout 0 "):
        judge_rollout(lambda p, c: None, PROMPT, completion("3"), 0)


def test_numpy_and_bool_rewards_become_floats():
    for given, wanted in ((np.float32(0.5), 0.5), (True, 1.0), (np.int64(2), 2.0)):
        reward = judge_rollout(lambda p, c, g=given: g, PROMPT, completion("3"), 0).reward
        assert (type(reward), reward) == (float, wanted)
