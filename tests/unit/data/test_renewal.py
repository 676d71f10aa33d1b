"""Laws of a renewed query set: what is drawn follows from the seed and the rewards, and resumes exactly."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_dist.config import RenewalConfig
from gspo_dist.data.cursor import PromptCursor
from gspo_dist.data.prompts import PromptSource
from gspo_dist.data.renewal import RenewedCursor
from gspo_dist.metrics.names import metric_of
from gspo_dist.types import Prompt
from tests.unit.trainer.small import rollout


def source(n: int) -> PromptSource:
    return PromptSource("test", [Prompt(str(i), (i,), str(i), "x") for i in range(n)])


def cursor(n=8, *, seed=0, shuffle=False, **knobs):
    return RenewedCursor(source(n), RenewalConfig(**knobs), seed=seed, shuffle=shuffle)


def ids(prompts) -> list[int]:
    return [int(p.prompt_id) for p in prompts]


def judged(prompts, rates, group_size=4):
    """A group for every prompt, of which the share `rates(prompt)` is solved."""
    return [
        replace(rollout(0, reward=float(i < rates(int(p.prompt_id)) * group_size)), prompt=p)
        for p in prompts
        for i in range(group_size)
    ]


def walk(c, batches, rates=lambda i: 0.5):
    """Draws and notes, batch after batch; returns what was drawn."""
    out = []
    for n in batches:
        prompts = c.next(n)
        out.append(ids(prompts))
        c.note(judged(prompts, rates))
    return out


@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_with_everything_in_play_it_is_the_plain_cursor(n, batches, seed):
    """A retirement that never happens, and no curriculum: every pass holds every prompt once."""
    c = cursor(n, seed=seed, shuffle=True, retire_at=1.0)
    drawn = [i for batch in walk(c, batches) for i in batch]
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


def test_a_prompt_leaves_for_good_when_it_is_solved_often_enough():
    """Rates 1, .75, .5, ...: at 0.75 prompts 0 and 1 leave after their first visit."""
    c = cursor(4, retire_at=0.75)
    assert walk(c, [4, 4, 2], lambda i: 1 - i / 4) == [[0, 1, 2, 3], [2, 3, 2, 3], [2, 3]]
    assert c.metrics() == {"data/in_play": 2, "data/waiting": 0, "data/retired": 2, "data/solve_rate": 0.375}


def test_the_rate_is_over_all_visits_and_leaves_time_for_them():
    c = cursor(2, retire_at=0.7, retire_after=2)
    rates = iter([1.0, 0.5, 0.5, 0.25])
    for n in (1, 1, 1, 1):
        prompts = c.next(n)
        rate = next(rates)
        c.note(judged(prompts, lambda i, rate=rate: rate))
    assert c.metrics()["data/retired"] == 1  # prompt 0: (1 + .5) / 2; prompt 1: (.5 + .25) / 2


def test_prompts_that_wait_take_the_places_of_those_that_left_and_come_in_by_rate():
    c = cursor(8, active=2, retire_at=1.0)
    assert walk(c, [2, 2, 2], lambda i: float(i == 1)) == [[0, 1], [2, 0], [2, 0]]
    assert cursor(8, active=2, retire_at=1.0, replace_retired=False).metrics()["data/waiting"] == 6
    c = cursor(8, active=2, arrivals=0.5)
    assert walk(c, [2, 2, 2, 2]) == [[0, 1], [0, 1], [2, 0], [1, 2]]
    assert c.metrics()["data/in_play"] == 4


def test_arrivals_stop_when_none_waits():
    c = cursor(3, active=1, arrivals=5.0)
    assert walk(c, [1, 2, 3]) == [[0], [1, 2], [0, 1, 2]]
    assert c.metrics()["data/waiting"] == 0


def test_a_curriculum_takes_the_rates_that_are_wanted_first_and_what_is_new_before_all():
    rates = {0: 1.0, 1: 0.5, 2: 0.0, 3: 0.75}
    c = cursor(4, curriculum=0.5)
    assert walk(c, [4, 4], rates.get) == [[0, 1, 2, 3], [1, 3, 0, 2]]
    c = cursor(5, active=4, curriculum=0.9, arrivals=0.25)
    assert walk(c, [4, 4, 5], lambda i: rates.get(i, 0.5)) == [[0, 1, 2, 3], [0, 3, 1, 2], [0, 3, 1, 2, 0]]
    for _ in range(2):
        walk(c, [1])
    c = cursor(3, active=2, curriculum=0.5, arrivals=1.0)
    assert walk(c, [2, 1, 3], lambda i: 0.0) == [[0, 1], [2], [0, 1, 2]]


def test_a_set_that_is_solved_whole_stops_with_the_way_out():
    c = cursor(2, retire_at=0.5)
    with pytest.raises(ValueError, match="retired all 2 prompts that came into play, and none waits: raise"):
        walk(c, [2, 1], lambda i: 1.0)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=8),
    st.integers(0, 8),
    st.integers(0, 3),
    st.sampled_from(
        [{"curriculum": 0.5}, {"retire_at": 0.9}, {"active": 4, "arrivals": 0.3, "retire_at": 1}]
    ),
)
def test_a_resumed_set_goes_on_with_the_very_next_prompts(batches, cut, seed, knobs):
    def rates(i):
        return (i % 4) / 4

    whole = cursor(9, seed=seed, shuffle=True, **knobs)
    walk(whole, batches[:cut], rates)
    resumed = cursor(9, seed=seed, shuffle=True, **knobs)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert walk(resumed, [*batches[cut:], 7], rates) == walk(whole, [*batches[cut:], 7], rates)
    assert resumed.state_dict() == whole.state_dict()


def test_a_checkpoint_of_another_set_is_refused():
    state = cursor(4, retire_at=1.0).state_dict()
    with pytest.raises(ValueError, match=r"data\.renewal: prompts must be what .* got 5, it has 4"):
        cursor(5, retire_at=1.0).load_state_dict(state, accept_other_prompts=True)
    with pytest.raises(ValueError, match=r"data\.renewal: seed must be"):
        cursor(4, seed=1, retire_at=1.0).load_state_dict(state)
    plain = PromptCursor(source(4), seed=0, shuffle=False)
    with pytest.raises(ValueError, match=r"data\.renewal: renewal must be .* got True, it has None"):
        cursor(4, retire_at=1.0).load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"data cursor: renewal must be .* got None, it has True"):
        plain.load_state_dict(state)


def test_prompts_that_were_edited_since_the_checkpoint_are_said(caplog):
    state = cursor(4, retire_at=1.0).state_dict()
    edited = {**state, "fingerprint": "0" * 16}
    with caplog.at_level(logging.WARNING):
        cursor(4, retire_at=1.0).load_state_dict(state)
        assert not caplog.text
        cursor(4, retire_at=1.0).load_state_dict(edited)
    assert "were edited since the checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"retire_at": 1.5}, "retire_at must be a solve rate between 0 and 1: got 1.5"),
        ({"retire_at": 0.0}, "retire_at must be above 0"),
        ({"curriculum": -0.1}, "curriculum must be a solve rate"),
        ({"arrivals": 1.0}, "got 1.0 with all of them in play; set data.renewal.active"),
        ({"active": 0}, "active must be at least 1"),
    ],
)
def test_bad_renewals_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        RenewalConfig(**knobs)


def test_more_prompts_in_play_than_there_are_are_refused():
    with pytest.raises(
        ValueError, match="active must be at most the number of training prompts: got 9 and 8"
    ):
        cursor(8, active=9)


def test_every_number_of_the_set_has_an_entry():
    assert all(metric_of(key) for key in cursor(8, active=2).metrics())
    assert not RenewalConfig().is_on
    assert all(RenewalConfig(**k).is_on for k in ({"active": 1}, {"retire_at": 1.0}, {"curriculum": 0.0}))
