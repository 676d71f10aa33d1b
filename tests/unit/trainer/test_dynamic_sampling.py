"""Dynamic sampling in the collector: what is asked for, that speed chooses nothing, what a resume finds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gspo_dist.config import RenewalConfig, RolloutConfig, SelectionConfig
from gspo_dist.data.cursor import PromptCursor
from gspo_dist.data.prompts import PromptSource
from gspo_dist.data.renewal import RenewedCursor
from gspo_dist.rewards.reward import Judged
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.clockwork import Clockwork
from gspo_dist.trainer.collect import collect
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.trainer.refill import NothingToLearn
from gspo_dist.trainer.rollout_files import load_rollouts, save_rollouts
from gspo_dist.types import Prompt, SamplingSpec
from tests.unit.trainer.test_pipeline import Adding


class JudgeByPrompt:
    """Sample 0 of a prompt is worth 1; the other one as much for prompts that teach nothing."""

    def judge(self, items):
        return [Judged(float(i % 2 == 0 or int(p.prompt_id) % 3 != 0), {}) for i, p, _ in items]


def make(*, lengths=lambda g, i: 1, steps_ahead=0, renewal=None, steps=9, over_asked=1, tries=3):
    config = RolloutConfig(prompts_per_step=2, group_size=2, steps_ahead=steps_ahead, ticks_per_step=None)
    prompts = PromptSource("test", [Prompt(str(i), (i,), str(i), "x") for i in range(40)])
    if renewal is None:
        cursor = PromptCursor(prompts, seed=0, shuffle=False)
    else:
        cursor = RenewedCursor(prompts, renewal, seed=0, shuffle=False)
    selection = SelectionConfig(degenerate="refill", over_asked=over_asked, tries=tries)
    return Collector(
        config,
        steps,
        Adding(lengths),
        JudgeByPrompt(),
        cursor,
        lambda step: SamplingSpec(n=2, max_tokens=8, seed=7),
        Clockwork(config),
        selection=selection,
    )


def step_of(collector, step):
    """What a step trains, as (group, prompt) of its groups; a publication follows."""
    run = SimpleNamespace(collector=collector, clock=StepClock())
    rollouts = collect(run, step)
    collector.pause()
    assert len(rollouts) == 4
    return [(r.group_id, int(r.prompt.prompt_id)) for r in rollouts[::2]]


def test_a_step_asks_again_until_it_has_its_groups():
    """Only every third prompt teaches: 0, 3, 6, ... Three are asked for at a time, two are needed."""
    collector = make()
    assert step_of(collector, 1) == [(0, 0), (3, 3)]
    # Ids 0 to 8 are step 1's, whatever it used of them. Prompts 6 to 11 are the next.
    assert step_of(collector, 2) == [(9, 6), (12, 9)]
    assert collector.metrics()["selection/tries"] == 2.0
    assert collector.metrics()["selection/asked_groups"] == 6.0


def test_one_try_is_enough_where_enough_is_asked_for():
    collector = make(over_asked=2)
    assert step_of(collector, 1) == [(0, 0), (3, 3)]
    assert collector.metrics()["selection/tries"] == 1.0
    assert collector.cursor.position == 4


@pytest.mark.parametrize("seed", range(5))
def test_speed_chooses_nothing(seed):
    """Whichever completions are quick, of those that teach or of the others, the batch is the same."""
    plain = make(over_asked=4)
    expected = [step_of(plain, step) for step in (1, 2, 3)]
    uneven = make(over_asked=4, lengths=lambda g, i: 1 + (g * 7 + i * 3 + seed * 5) % 8)
    assert [step_of(uneven, step) for step in (1, 2, 3)] == expected
    slow_teach = make(over_asked=4, lengths=lambda g, i: 8 if g % 3 == 0 else 1)
    assert [step_of(slow_teach, step) for step in (1, 2, 3)] == expected


def test_a_set_that_teaches_nothing_stops_the_run_with_its_solve_rates():
    collector = make(tries=2)
    collector.rewards.judge = lambda items: [Judged(1.0, {}) for _ in items]
    with pytest.raises(NothingToLearn, match=r"step 1 got 0 of 6 in 2 tries \(mean reward .* 1\.00: 6\)"):
        step_of(collector, 1)


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
@pytest.mark.parametrize("renewal", [None, RenewalConfig(active=20, arrivals=1.5, retire_at=1.0)])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_draws_what_it_would_have_drawn(steps_ahead, renewal, cut, tmp_path):
    """Also where later steps were begun before an earlier one asked again, and where rewards decide."""
    whole = make(steps_ahead=steps_ahead, renewal=renewal)
    expected = [step_of(whole, step) for step in range(1, 7)]
    first = make(steps_ahead=steps_ahead, renewal=renewal)
    assert [step_of(first, step) for step in range(1, cut + 1)] == expected[:cut]
    saved = json.loads(json.dumps([first.saved_cursor(), save_rollouts(first.buffer, tmp_path)]))
    resumed = make(steps_ahead=steps_ahead, renewal=renewal)
    resumed.continue_from(cut, saved[0], accept_other_prompts=False)
    load_rollouts(resumed, tmp_path, saved[1])
    assert [step_of(resumed, step) for step in range(cut + 1, 7)] == expected[cut:]
    assert resumed.cursor.state_dict() == whole.cursor.state_dict()


def test_what_is_drawn_follows_the_rewards_of_the_steps_before():
    """Prompts 1 and 2 are always right: they leave, and others take their place."""
    collector = make(renewal=RenewalConfig(active=4, retire_at=1.0))
    assert step_of(collector, 1) == [(0, 0), (3, 3)]
    assert collector.metrics()["data/retired"] == 2
    # The pass under way ends with 4 and 5; the next one has 0, 3 and what came for them.
    assert step_of(collector, 2) == [(9, 3), (12, 0)]
    assert collector.metrics()["data/retired"] == 4


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[1, 17]], "got 17 tokens from step 1 on and 16; raise max_completion_tokens"),
        ([[2, 4]], r"must begin with step 1 and go up: got the steps \[2\]"),
        ([[1, 4], [1, 8]], r"got the steps \[1, 1\]"),
        ([[1, 4], [5, 8], [3, 9]], r"got the steps \[1, 5, 3\]"),
        ([[1]], r"must be pairs \[step, tokens\].*got \[1\]"),
        ([[1, 0]], "whole numbers from 1 on"),
        ([[True, 4]], "whole numbers from 1 on"),
        (["1: 4"], "must be pairs"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(max_completion_tokens=16, length_schedule=schedule)
