"""What an environment's section accepts, and what it must agree on with the rest."""

from __future__ import annotations

import pytest

from gspo_dist.cli.compose import run_config
from gspo_dist.config import EnvironmentConfig


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_turns": 0}, "environment.max_turns"),
        ({"tokens_per_turn": 0}, "environment.tokens_per_turn"),
        ({"tokens_per_answer": 0}, "environment.tokens_per_answer"),
        ({"timeout_s": 0.0}, "environment.timeout_s"),
        ({"workers": 0}, "environment.workers"),
        ({"reward": "both"}, "environment.reward"),
    ],
)
def test_values_that_mean_nothing_are_refused(knobs, words) -> None:
    with pytest.raises(ValueError, match=words):
        EnvironmentConfig(factory="guess", **knobs)


def test_by_default_there_is_none() -> None:
    assert not run_config([]).environment.is_on
    assert run_config(["experiment=calculator"]).environment.stop == ("=",)
    assert not run_config(["experiment=calculator", "environment.factory=null"]).environment.is_on


def test_turns_have_advantages_where_the_objective_has_them_per_token() -> None:
    assert run_config(["experiment=guess"]).objective.credit == "turn"
    assert run_config(["experiment=guess", "objective=grpo"]).objective.credit == "turn"
    with pytest.raises(ValueError, match=r"credit=turn gives tokens advantages .* and gspo has one per seq"):
        run_config(["experiment=guess", "objective=gspo"])
    with pytest.raises(ValueError, match="gmpo has one per sequence"):
        run_config(["experiment=guess", "objective=gmpo"])
    with pytest.raises(ValueError, match=r"objective.credit=turn needs an environment"):
        run_config(["objective=grpo", "objective.credit=turn"])


def test_a_record_of_ticks_does_not_repeat_an_environment() -> None:
    with pytest.raises(ValueError, match=r"rollout.replay_ticks repeats what engines did.*ticks_per_step"):
        run_config(["experiment=guess", "rollout.steps_ahead=1", "rollout.replay_ticks=ticks.jsonl"])
