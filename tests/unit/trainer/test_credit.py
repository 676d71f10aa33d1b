"""What each turn of an episode was paid, and the advantage that its tokens get for it."""

from __future__ import annotations

import numpy as np
import pytest

from gspo_dist.trainer.credit import advantages_by_turn, turn_rewards
from gspo_dist.types import NO_VERSION, Completion, Rollout, Turn
from tests.unit.trainer.small import rollout as plain


def episode(index, group, reward, turns, tokens=6):
    """The policy's tokens are those between `start` and `end` of a turn."""
    mask = np.zeros(tokens, bool)
    for turn in turns[1:]:
        mask[turn.start : turn.end] = True
    versions = np.where(mask, 3, NO_VERSION)
    made = Completion(np.arange(tokens), mask, np.zeros(tokens), versions, "stop", "t", turns=tuple(turns))
    return Rollout(index, group, plain(0).prompt, made, reward)


RESET = Turn(0, 1, 1)
"""The environment begins with one token."""


def turns(first, second):
    """Tokens 1 and 2, an answer of one token, tokens 4 and 5."""
    return (RESET, Turn(1, 3, 4, reward=first), Turn(4, 6, 6, reward=second))


def test_what_the_environment_did_not_pay_is_paid_for_the_last_turn():
    assert turn_rewards(episode(0, 0, 1.5, turns(0.5, 0.0))).tolist() == [0.5, 1.0]
    assert turn_rewards(episode(0, 0, 0.75, turns(0.5, 0.25))).tolist() == [0.5, 0.25]
    assert turn_rewards(episode(0, 0, -1.0, turns(0.5, 0.25))).tolist() == [0.5, -1.5]
    assert turn_rewards(episode(0, 0, 1.5, turns(0.5, 0.0)), 0.25).tolist() == [0.5, 0.75]
    assert turn_rewards(episode(0, 0, 2.0, (RESET, Turn(1, 6, 6)))).tolist() == [2.0]


def test_a_turns_tokens_have_the_advantage_of_what_is_paid_from_it_on():
    """Group 5: returns from turn 1 on 1.5 and 0.5, from turn 2 on 1 and 0.5; against their means over the
    turns that begin at the same place. The environment's tokens 0 and 3 have none.
    """
    pair = [episode(0, 5, 1.5, turns(0.5, 0.0)), episode(1, 5, 0.5, turns(0.0, 0.5))]
    one, two = advantages_by_turn(pair, [0.0, 0.0], "group_mean")
    assert one.dtype == np.float64
    assert one.tolist() == [0.0, 0.5, 0.5, 0.0, 0.25, 0.25]
    assert two.tolist() == [0.0, -0.5, -0.5, 0.0, -0.25, -0.25]


def test_penalties_and_groups_are_each_rollouts_own():
    rewards = {0: (5, 1.0), 1: (5, 0.0), 2: (6, 4.0), 3: (6, 0.0)}
    four = [episode(i, group, reward, turns(0.0, 0.0)) for i, (group, reward) in rewards.items()]
    found = advantages_by_turn(four, [0.0, 0.5, 0.0, 0.0], "group_mean")
    assert [values[1] for values in found] == [0.75, -0.75, 2.0, -2.0]


def test_a_penalty_too_few_is_not_believed():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        advantages_by_turn([episode(0, 0, 1.0, turns(0, 0))] * 2, [0.0], "group_mean")
