"""The three kinds of rewards through real reward processes: plain, async, batched."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.calls import as_one, is_batched, verdicts
from gspo_dist.rewards.pool import CHUNK, ERRORS_IN_A_ROW, LocalRewardPool
from gspo_dist.rewards.reward import RewardError
from gspo_dist.types import Completion, Prompt

REWARDS = """
import asyncio, time

running = most = 0

async def later(prompt, completion, *, seconds=0.3):
    global running, most
    running += 1
    most = max(most, running)
    if completion.text == "raise":
        raise KeyError("gold")
    if completion.text == "hang":
        await asyncio.sleep(60)
    await asyncio.sleep(seconds)
    running -= 1
    return float(completion.text), {"most": most}

def many(prompts, completions, *, offset=0):
    texts = [completion.text for completion in completions]
    if "raise" in texts:
        raise KeyError("gold")
    if "short" in texts:
        return [1.0]
    if "hang" in texts:
        time.sleep(60)
    return [(float(text) + offset, {"size": len(texts)}) for text in texts]

async def many_later(prompts, completions):
    await asyncio.sleep(0.01)
    return [float(completion.text) for completion in completions]
"""


@pytest.fixture
def pool_of(reward_file):
    made = []

    def make(function: str, **knobs):
        made.append(LocalRewardPool(RewardConfig(function=f"{reward_file(REWARDS)}:{function}", **knobs)))
        made[-1].start()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def items(*texts: str):
    ones = np.ones(1)
    return [
        (i, Prompt("p", (1,), "q"), Completion(ones, ones, ones, ones, "stop", t))
        for i, t in enumerate(texts)
    ]


@pytest.mark.slow
def test_async_rewards_overlap_and_keep_their_order(pool_of):
    pool = pool_of("later")
    begun = time.monotonic()
    verdicts = pool.judge(items(*[str(i) for i in range(40)]))
    assert [verdict.reward for verdict in verdicts] == list(range(40))
    assert max(verdict.parts["most"] for verdict in verdicts) >= 10
    assert time.monotonic() - begun < 40 * 0.3 / 2


@pytest.mark.slow
def test_an_async_reward_that_hangs_costs_its_own_rollout_only(pool_of):
    verdicts = pool_of("later", timeout_s=1.5, timeout_reward=-1).judge(items("1", "hang", "2", "3"))
    assert [verdict.reward for verdict in verdicts] == [1, -1, 2, 3]
    assert verdicts[1].parts == {"timeout": 1.0}


def test_batched_rewards_get_lists(pool_of):
    verdicts = pool_of("many", options={"offset": 100}).judge(items(*map(str, range(100))))
    assert [verdict.reward for verdict in verdicts] == list(range(100, 200))
    sizes = [verdict.parts["size"] for verdict in verdicts]
    assert 1 < max(sizes) <= CHUNK
    assert [v.reward for v in pool_of("many_later").judge(items("1", "2"))] == [1, 2]


@pytest.mark.parametrize(
    ("function", "text", "words"),
    [
        ("later", "raise", r"reward of rollout 1 \(prompt p\) raised KeyError: 'gold'"),
        ("many", "raise", r"raised KeyError: 'gold'"),
        ("many", "short", r"a batched reward must return a list of \d verdicts: got 1"),
    ],
)
def test_what_they_raise_names_a_rollout(pool_of, function, text, words):
    with pytest.raises(RewardError, match=words):
        pool_of(function).judge(items("1", text, text, text, text))


def test_an_error_has_a_stated_reward(pool_of):
    pool = pool_of("later", error_reward=-0.5, options={"seconds": 0})
    verdicts = pool.judge(items("1", "raise", "2"))
    assert [verdict.reward for verdict in verdicts] == [1, -0.5, 2]
    assert verdicts[1].parts == {"error": 1.0}


def test_a_reward_that_always_raises_stops_all_the_same(pool_of):
    pool = pool_of("later", error_reward=0.0)
    pool.judge(items(*["raise"] * (ERRORS_IN_A_ROW - 1), "1"))
    with pytest.raises(RewardError, match="gold"):
        pool.judge(items(*["raise"] * ERRORS_IN_A_ROW))


def test_every_kind_is_called_for_one_completion_as_a_plain_function():
    """By `as_one`, where somebody has one completion and no reward process."""
    ((_, prompt, completion),) = items("4")

    def plain(prompt, completion):
        return 1.0

    async def later(prompt, completion):
        if completion.text != "4":
            raise KeyError(completion.text)
        return 2.0, {"seen": prompt.prompt_id}

    def many(prompts, completions):
        return [(3.0, {"seen": [p.prompt_id for p in prompts]})]

    async def many_later(prompts, completions):
        return [float(c.text) for c in completions]

    assert as_one(plain) is plain
    found = [as_one(function)(prompt, completion) for function in (later, many, many_later)]
    assert found == [(2.0, {"seen": "p"}), (3.0, {"seen": ["p"]}), 4.0]
    with pytest.raises(KeyError, match="5"):
        as_one(later)(prompt, items("5")[0][2])


def test_verdicts_come_in_order_with_exceptions_in_their_places():
    prompts = [prompt for _, prompt, _ in items("1", "raise", "3")]
    completions = [completion for _, _, completion in items("1", "raise", "3")]

    def plain(prompt, completion):
        return float(completion.text)

    async def later(prompt, completion):
        return float(completion.text)

    for function in (plain, later):
        one, error, three = verdicts(function, prompts, completions)
        assert (one, type(error), three) == (1.0, ValueError, 3.0)
    assert not is_batched(lambda prompt, completion, third: 0.0)
    assert is_batched(lambda prompts, completions, third: [])


@pytest.mark.parametrize(
    ("found", "got"), [([1.0], "1"), ((1.0, 2.0, 3.0), "3"), ({1: 1.0, 2: 2.0}, "dict"), (2.0, "float")]
)
def test_a_batched_reward_returns_as_many_verdicts_as_it_was_asked_for(found, got):
    def many(prompts, completions):
        return found

    with pytest.raises(ValueError, match=f"must return a list of 2 verdicts: got {got}$"):
        list(verdicts(many, [None, None], [None, None]))
    found = [1.0, 2.0]
    assert list(verdicts(many, [None, None], [None, None])) == [1.0, 2.0]


def test_verdicts_that_nobody_waits_for_are_cancelled():
    ended = []

    async def later(prompt, completion):
        try:
            await asyncio.sleep(60 if completion else 0)
        except asyncio.CancelledError:
            ended.append(completion)
            raise
        return 1.0

    found = verdicts(later, [None] * 3, [0, 1, 2])
    assert next(found) == 1.0
    found.close()
    assert sorted(ended) == [1, 2]
