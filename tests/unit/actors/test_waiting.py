"""How long answers are waited for, and what a silence, an error or a death becomes: on a virtual clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gspo_dist.actors import everywhere, process
from gspo_dist.actors.everywhere import ANSWER_TIMEOUT_S, Asked, ask_every_host
from gspo_dist.actors.process import Actors, ProcessDied, ProcessTimeout
from gspo_dist.actors.session import Node
from gspo_dist.actors.weight_link import hear_all
from gspo_dist.weights.group import TransferFailed
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.actors.virtual_ray import NEVER, Handle, died, due, raised


@pytest.fixture
def actors(world, tmp_path) -> Actors:
    names = ("one", "two", "three")
    for name in names:
        (tmp_path / f"{name}.log").write_text(f"last words of {name}\n")
    return Actors({name: Handle(world, name) for name in names}, tmp_path)


# --- all answers, or the first failure ----------------------------------------------------------------------


def test_a_call_reaches_every_actor_with_its_arguments(world, actors) -> None:
    world.answers = {("one", "add"): [(2.0, 5)], ("two", "add"): [(1.0, 6)], ("three", "add"): [(0.5, 7)]}
    assert actors.call_all("add", 3, timeout=4.0, to=4) == {"one": 5, "two": 6, "three": 7}
    assert world.calls == [(name, "add", 3, 4) for name in ("one", "two", "three")]
    assert world.waits == [4.0, 3.5, 3.0]  # the timeout is of all together


def test_answers_are_told_in_the_order_of_the_question(world, actors) -> None:
    answers = actors.gather(due(one=3.0, two=1.0, three=2.0), 60.0)
    assert list(answers.items()) == [("one", "ONE"), ("two", "TWO"), ("three", "THREE")]
    assert world.now == 3.0


def test_what_comes_after_the_time_is_late_and_the_late_ones_are_named(world, actors) -> None:
    """The first answer comes in the last moment, which leaves no time to the others."""
    with pytest.raises(ProcessTimeout) as late:
        actors.gather(due(one=3.5, two=3.0, three=NEVER), 3.0)
    assert str(late.value).splitlines() == [
        "no answer within 3 s from one, three",
        "  last lines of its log:",
        "    last words of one",
    ]
    assert world.now == 3.0


def test_the_first_failure_is_raised_at_once(world, actors, tmp_path) -> None:
    with pytest.raises(KeyError) as error:
        actors.gather(due(one=60.0, two=(1.0, raised(KeyError("gold")))), 100.0)
    assert error.value.__notes__ == [
        f"raised in two; its log: {tmp_path / 'two.log'}\n  last lines of its log:\n    last words of two"
    ]
    with pytest.raises(ProcessDied) as death:
        actors.gather(due(one=60.0, two=(2.0, died("it was killed\nby a signal"))), 100.0)
    assert str(death.value) == "two died: it was killed\n  last lines of its log:\n    last words of two"
    assert world.now == 2.0


def test_an_error_that_ray_cannot_bring_back_is_told_as_ray_tells_it(world, actors) -> None:
    with pytest.raises(process.ray.exceptions.RayTaskError, match="its traceback") as error:
        actors.gather(due(one=(1.0, raised(None))), 2.0)
    assert error.value.__notes__[0].startswith("raised in one; ")


def test_a_log_that_is_no_text_is_shown_as_far_as_it_is(actors, tmp_path) -> None:
    (tmp_path / "one.log").write_bytes(b"half of \xe2\x82")
    assert actors.tail("one") == "  last lines of its log:\n    half of \ufffd"


def test_a_death_is_looked_for_among_other_errors(world, actors) -> None:
    refs = due(one=(1.0, raised(OSError("lost"))), two=2.0, three=(3.0, died("killed")))
    found = actors.death_among(refs, 10.0)
    assert str(found).startswith("three died: killed\n")
    assert (world.now, world.waits) == (3.0, [10.0, 9.0, 8.0])


def test_a_death_is_waited_for_no_longer_than_said(world, actors) -> None:
    assert actors.death_among(due(one=(10.0, raised(OSError()))), 20.0) is None
    assert world.now == 10.0  # all have answered
    assert actors.death_among(due(one=30.0, two=(30.5, died())), 20.0) is None
    assert world.now == 30.0


# --- each answer for itself ---------------------------------------------------------------------------------


def test_a_failure_holds_nobody_off(world, actors) -> None:
    lost = OSError("a worker is gone")
    refs = due(one=(1.0, raised(lost)), two=(2.0, died("killed")), three=(4.0, "three's"))
    answers, failures = actors.each(refs | due(four=9.0), 5.0)
    assert (answers, world.now) == ({"three": "three's"}, 5.0)
    assert list(failures) == ["one", "two", "four"]
    assert failures["one"] is lost
    assert isinstance(failures["two"], ProcessDied)
    assert isinstance(failures["four"], ProcessTimeout)
    assert str(failures["four"]).startswith("four gave no answer within 5 s\n  (no log at ")
    assert actors.each({}, 5.0) == ({}, {})


def test_a_refusal_is_the_callers_fault_and_is_raised_once_all_have_answered(world, actors) -> None:
    first, second = ValueError("this"), WeightSyncError("that")
    refs = due(one=(2.0, raised(first)), two=(1.0, raised(second)), three=4.0)
    with pytest.raises(ValueError, match="this") as refused:
        actors.each(refs, 5.0)
    assert (refused.value, world.now) == (first, 4.0)


def test_what_breaks_in_an_actor_may_be_told_apart_from_its_end(world, actors) -> None:
    refs = due(one=(1.0, died("killed")), two=(2.0, raised(OSError("lost"))))
    assert list(actors.each(refs, 5.0)[1]) == ["one", "two"]
    with pytest.raises(OSError, match="lost"):
        actors.each(refs, 5.0, deaths_only=True)
    assert list(actors.each(due(one=(1.0, died("killed"))), 5.0, deaths_only=True)[1]) == ["one"]


def test_all_are_asked_to_close_and_waited_for_together(world, actors) -> None:
    world.answers = {("one", "close"): [2.0], ("two", "close"): [NEVER], ("three", "close"): [1.0]}
    actors.ask_to_close(7.0)
    assert ([call[:2] for call in world.calls], world.now) == ([(n, "close") for n in actors.handles], 7.0)
    Actors({}, Path("logs")).ask_to_close(7.0)
    assert (world.now, world.killed) == (7.0, [])
    actors.kill()
    assert world.killed == list(actors.handles.values())


def test_memory_is_told_by_name_and_not_waited_for_for_ever(world, actors) -> None:
    world.answers = {"peak_memory": [(1.0, {"host": 5})] * 3 + [NEVER]}
    assert actors.peak_memory() == {name: {"host": 5} for name in actors.handles}
    with pytest.raises(ProcessTimeout, match=r"from one, two, three"):
        actors.peak_memory()


# --- one bucket of weights ----------------------------------------------------------------------------------


def test_a_failure_without_words_is_told_by_its_kind(world, actors) -> None:
    refs = due(one=(1.0, raised(TransferFailed())), two=(2.0, died("killed")))
    with pytest.raises(ProcessDied, match="two died: killed") as death:
        hear_all(actors, refs, 60.0)
    assert death.value.__notes__ == ["one then said: TransferFailed()"]


# --- every host ---------------------------------------------------------------------------------------------


def host(number: int) -> Node:
    return Node(f"{number + 1:056x}", f"host{number}", f"10.0.0.{number}", 8, 0, 1)  # Ray checks names


def test_a_host_that_is_late_holds_up_no_other_and_is_its_own_answer(world, monkeypatch) -> None:
    """The second of four answers half a second late, and the last one too. The third did long before."""
    hosts = [host(i) for i in range(4)]
    monkeypatch.setattr(everywhere, "nodes", lambda: hosts)
    world.answers = {"call": [(3.0, "zero"), (ANSWER_TIMEOUT_S + 0.5, "one"), (4.0, "two")]}
    world.answers["call"].append((ANSWER_TIMEOUT_S + 0.2, "three"))
    world.answers |= {"now": [(0.0, 5e9)]}
    answers = ask_every_host(divmod, 7, 4)
    assert [call for call in world.calls if call[1] == "call"] == [("Asked", "call", divmod, 7, 4)] * 4
    assert world.now == ANSWER_TIMEOUT_S
    assert [answer.node for answer in answers] == hosts
    assert [answers[0].value, answers[2].value] == ["zero", "two"]
    assert [type(answers[i].value) for i in (1, 3)] == [process.ray.exceptions.GetTimeoutError] * 2
    ahead = pytest.approx(5e9 - time.time(), abs=600)
    assert [answer.clock_s for answer in answers] == [ahead, 0.0, ahead, 0.0]
    assert [handle.options["num_cpus"] for handle in world.killed] == [0] * 4
    places = [handle.options["scheduling_strategy"] for handle in world.killed]
    assert [(place.node_id, place.soft) for place in places] == [(node.node_id, False) for node in hosts]


def test_a_host_whose_clock_cannot_be_read_is_its_own_answer(world, monkeypatch) -> None:
    monkeypatch.setattr(everywhere, "nodes", lambda: [host(0)])
    world.answers = {"call": [(3.0, "zero")], "now": [NEVER]}
    (answer,) = ask_every_host(divmod, 7, 4)
    assert (type(answer.value), answer.clock_s) == (process.ray.exceptions.GetTimeoutError, 0.0)


def test_a_process_that_is_asked_answers_and_tells_its_time() -> None:
    asked = Asked()
    assert asked.call(divmod, 7, 4) == (1, 3)
    assert asked.now() == pytest.approx(time.time(), abs=60)
