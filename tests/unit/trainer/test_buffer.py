"""Steps that are begun: which completions are theirs, what still waits, and what a whole step is."""

from __future__ import annotations

import pytest

from gspo_dist.rewards.reward import Judged
from gspo_dist.trainer.buffer import BegunStep, Buffer
from gspo_dist.types import UNBEGUN, SamplingSpec, Work
from tests.unit.trainer.small import rollout

SPEC = SamplingSpec(n=2, max_tokens=8, seed=7)


def prompt(i):
    return rollout(i).prompt


def completion(i, tokens=3):
    """Whose text says which one it is."""
    return rollout(i, tokens=range(tokens)).completion


def begun(first=3, groups=2):
    return BegunStep([prompt(i) for i in range(first, first + groups)], first, SPEC, {"place": 9})


def finished_and_judged(step):
    for i, key in enumerate(step.all_keys()):
        step.finished[key] = completion(i)
        step.verdicts[key] = Judged(i / 2, {"part": float(i)})
    return step


def test_its_completions_are_named_group_after_group():
    assert begun().all_keys() == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert [begun().prompt(key).prompt_id for key in [(3, 1), (4, 0)]] == ["p3", "p4"]


def test_it_is_sampled_when_the_last_of_them_is_whole():
    step = begun()
    for i, key in enumerate(step.all_keys()):
        assert not step.is_sampled()
        step.finished[key] = completion(i)
    assert step.is_sampled()


def test_what_is_judged_is_what_finished_since_under_the_ids_of_the_run():
    """Completions finish in any order. Rollout ids count over the run: group 3 of 2 begins with 6."""
    step = begun()
    step.finished = {(4, 1): completion(0), (3, 1): completion(1)}
    items = step.unjudged()
    assert [(i, p.prompt_id, c.text) for i, p, c in items] == [(7, "p3", "c1"), (9, "p4", "c0")]
    step.take(items, [Judged(0.25, {}), Judged(0.75, {"a": 1.0})])
    assert step.verdicts == {(3, 1): Judged(0.25, {}), (4, 1): Judged(0.75, {"a": 1.0})}
    assert step.unjudged() == []
    step.finished[3, 0] = completion(2)
    assert [i for i, _, _ in step.unjudged()] == [6]


def test_a_verdict_too_few_or_too_many_is_not_believed():
    step = begun()
    step.finished = {(3, 0): completion(0), (3, 1): completion(1)}
    for count in (1, 3):
        with pytest.raises(ValueError, match="argument 2 is"):
            step.take(step.unjudged(), [Judged(0.0, {})] * count)


def test_a_whole_step_is_its_rollouts_in_order():
    found = finished_and_judged(begun()).rollouts()
    assert [(r.rollout_id, r.group_id) for r in found] == [(6, 3), (7, 3), (8, 4), (9, 4)]
    assert [(r.prompt.prompt_id, r.completion.text) for r in found] == [
        ("p3", "c0"), ("p3", "c1"), ("p4", "c2"), ("p4", "c3"),
    ]  # fmt: skip
    assert [r.reward for r in found] == [0.0, 0.5, 1.0, 1.5]
    assert [r.reward_parts for r in found] == [{"part": float(i)} for i in range(4)]


def test_another_try_takes_the_ids_after_the_steps_own():
    step = finished_and_judged(begun())
    work = step.add([prompt(20), prompt(21)], [20, 21])
    assert [item.key for item in work] == [(5, 0), (5, 1), (6, 0), (6, 1)]
    assert [item.prompt.prompt_id for item in work] == ["p20", "p20", "p21", "p21"]
    assert all(item.spec is SPEC and item.so_far is UNBEGUN for item in work)
    assert (step.tries, step.drawn) == (2, [20, 21])
    assert step.prompt((6, 1)).prompt_id == "p21"
    assert not step.is_sampled()
    step.add([prompt(30)], [30])
    assert (step.tries, step.drawn, step.all_keys()[-1]) == (3, [20, 21, 30], (7, 1))


@pytest.fixture
def buffer():
    """Step 1 with groups 0 and 1, step 2 with groups 2 and 3, all waiting."""
    buffer = Buffer()
    buffer.begin(begun(0))
    buffer.begin(begun(2))
    return buffer


def test_steps_count_from_one_and_their_work_waits_in_order(buffer):
    assert Buffer().begun == 0
    assert (buffer.begun, list(buffer.steps)) == (2, [1, 2])
    assert [item.key for item in buffer.waiting] == [(g, i) for g in range(4) for i in range(2)]
    assert [item.prompt.prompt_id for item in buffer.waiting[::2]] == ["p0", "p1", "p2", "p3"]
    assert all(item.spec is SPEC for item in buffer.waiting)


def test_a_completion_belongs_to_the_step_that_has_its_group(buffer):
    steps = [buffer.step_of((group, 0)) for group in range(5)]
    assert [None if s is None else s.first_group for s in steps] == [0, 0, 2, 2, None]
    del buffer.steps[1]
    assert buffer.step_of((1, 0)) is None
    assert buffer.step_of((2, 0)) is buffer.steps[2]


def test_what_finished_goes_to_its_step(buffer):
    buffer.finish({(2, 1): completion(0), (1, 0): completion(1)})
    assert {k: c.text for k, c in buffer.steps[1].finished.items()} == {(1, 0): "c1"}
    assert {k: c.text for k, c in buffer.steps[2].finished.items()} == {(2, 1): "c0"}
    with pytest.raises(KeyError, match="completion 1 of group 4 belongs to no step that is begun"):
        buffer.finish({(4, 1): completion(0)})


def test_what_waits_takes_up_what_it_had_and_what_finished_waits_no_more(buffer):
    buffer.finish({(0, 1): completion(0), (3, 0): completion(1)})
    buffer.go_on({(1, 1): completion(2, tokens=5), (3, 0): completion(3)})
    assert [(item.key, len(item.so_far)) for item in buffer.waiting] == [
        ((0, 0), 0), ((1, 0), 0), ((1, 1), 5), ((2, 0), 0), ((2, 1), 0), ((3, 1), 0),
    ]  # fmt: skip


def test_its_tokens_are_those_of_finished_and_waiting_completions(buffer):
    assert buffer.tokens() == 0
    buffer.finish({(0, 0): completion(0, tokens=7), (2, 1): completion(1, tokens=4)})
    buffer.waiting = [Work(1, 0, prompt(1), SPEC, completion(2, tokens=5))]
    assert buffer.tokens() == 7 + 4 + 5
