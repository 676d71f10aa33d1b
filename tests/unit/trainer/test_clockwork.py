"""How long engines sample: by the clock, by counted ticks, or as a record of another run says."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from gspo_dist.config import RolloutConfig, RunConfig
from gspo_dist.metrics.jsonl import append, read_jsonl
from gspo_dist.trainer.clockwork import Clockwork, Slice, open_record, read_record, settings

BY_THE_CLOCK = RolloutConfig(steps_ahead=1)
BY_TICKS = RolloutConfig(steps_ahead=1, ticks_per_step=21)
RECORD = {1: {"engine-0": 19, "engine-1": 3}, 2: {}}


def begun(config=BY_THE_CLOCK, record=None, step=1, folder=None):
    clockwork = Clockwork(config, record, folder)
    clockwork.begin(step)
    return clockwork


def test_by_the_clock_a_slice_is_a_time_and_the_last_one_ends_with_the_learner():
    clockwork = begun()
    assert clockwork.is_by_the_clock
    assert clockwork.slice() == Slice(ticks=None, seconds=0.25)
    assert clockwork.slice_beside(is_learned=False) == Slice(ticks=None, seconds=0.25)
    assert clockwork.slice_beside(is_learned=True) is None


def test_counted_ticks_are_done_beside_the_learner_however_long_it_takes():
    clockwork = begun(BY_TICKS)
    assert not clockwork.is_by_the_clock
    assert [clockwork.slice() for _ in range(4)] == [Slice(8, None)] * 4  # a collect ends with its step
    asked = [clockwork.slice_beside(is_learned) for is_learned in (False, True, True, False, True)]
    assert asked == [Slice(8, None), Slice(8, None), Slice(5, None), None, None]
    clockwork.begin(2)
    assert clockwork.slice_beside(is_learned=True) == Slice(8, None)


def test_no_ticks_is_a_count_and_not_the_clock():
    clockwork = begun(replace(BY_TICKS, ticks_per_step=0))
    assert not clockwork.is_by_the_clock
    assert clockwork.slice_beside(is_learned=False) is None


def test_before_the_first_publication_nothing_is_counted():
    clockwork = Clockwork(BY_TICKS)
    assert (clockwork.step, clockwork.left_beside, clockwork.done) == (0, 0, {})


def test_ticks_of_an_engine_add_up_until_the_next_publication():
    clockwork = begun()
    for engine, ticks in [("engine-0", 3), ("engine-1", 0), ("engine-0", 4)]:
        clockwork.note(engine, ticks)
    assert clockwork.done == {"engine-0": 7}
    clockwork.begin(2)
    assert (clockwork.step, clockwork.done) == (2, {})


def test_a_record_is_done_again_engine_by_engine_in_slices_of_its_own():
    clockwork = begun(record=RECORD)
    assert not clockwork.is_by_the_clock
    assert clockwork.slice() == Slice({"engine-0": 8, "engine-1": 3}, None)
    clockwork.note("engine-0", 8)
    clockwork.note("engine-1", 3)
    # Whether the learner is done decides nothing.
    assert clockwork.slice_beside(is_learned=True) == Slice({"engine-0": 8, "engine-1": 0}, None)
    clockwork.note("engine-0", 8)
    assert clockwork.slice() == Slice({"engine-0": 3, "engine-1": 0}, None)
    clockwork.note("engine-0", 3)
    assert clockwork.slice_beside(is_learned=False) is None
    with pytest.raises(ValueError, match=r"step 1 is not sampled after its recorded ticks .*'engine-0': 19"):
        clockwork.slice()


@pytest.mark.parametrize(("step", "ticks"), [(2, "{}"), (3, "None")])
def test_a_step_without_recorded_ticks_is_no_step_of_that_run(step, ticks):
    clockwork = begun(record=RECORD, step=step)
    assert clockwork.slice_beside(is_learned=False) is None
    with pytest.raises(ValueError, match=rf"replay_ticks: step {step} is not .* ticks \({ticks}\)"):
        clockwork.slice()
    assert "(None)" in str(begun(step=step).off_the_record())


def test_what_engines_did_for_a_step_is_written_once_when_they_are_empty(tmp_path):
    clockwork = Clockwork(BY_THE_CLOCK, folder=tmp_path)
    clockwork.close()  # as at a resumed run's start: no step was begun
    for step, deaths in [(4, []), (5, ["engine-1"])]:
        clockwork.begin(step)
        clockwork.note("engine-0", step)
        clockwork.close(deaths)
        clockwork.close(deaths)
    assert read_jsonl(tmp_path / "ticks.jsonl") == [
        {"step": 4, "ticks": {"engine-0": 4}},
        {"step": 5, "ticks": {"engine-0": 5}, "deaths": ["engine-1"]},
    ]


def test_a_run_goes_on_where_its_ticks_cannot_be_written(tmp_path, caplog):
    begun(folder=tmp_path / "none").close()
    assert "the run goes on without ticks.jsonl" in caplog.text
    begun(folder=None).close()  # nobody wants them


# --- the file ---

RUN = RunConfig(rollout=BY_THE_CLOCK, steps=2)


def written(folder, *rows):
    open_record(folder, RUN, 0)
    append(folder / "ticks.jsonl", rows)
    return folder / "ticks.jsonl"


TWO_STEPS = ({"step": 1, "ticks": {"engine-0": 5}}, {"step": 2, "ticks": {"engine-0": 6}})


def test_a_record_is_read_as_it_was_written(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert read_record(written(tmp_path, *TWO_STEPS), RUN) == {1: {"engine-0": 5}, 2: {"engine-0": 6}}
    assert not caplog.messages


def test_it_says_what_it_depends_on_and_is_cut_back_where_a_run_goes_on(tmp_path):
    path = written(tmp_path, *TWO_STEPS)
    first = read_jsonl(path)[0]
    assert first == {"step": 0, "run": settings(RUN)}
    assert first["run"]["seed"] == 0
    assert first["run"]["rollout.steps_ahead"] == 1
    open_record(tmp_path, RUN, 1)
    assert read_jsonl(path) == [first, TWO_STEPS[0]]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (replace(RUN, seed=3), r"seed \(was 0, now 3\)"),
        (replace(RUN, mini_batches=8), r"mini_batches \(was 4, now 8\)"),
        (replace(RUN, rollout=replace(BY_THE_CLOCK, engines=9)), r"rollout\.engines \(was \d, now 9\)"),
        (
            replace(RUN, rollout=replace(BY_THE_CLOCK, steps_ahead=2)),
            r"rollout\.steps_ahead \(was 1, now 2\)",
        ),
    ],
)
def test_a_record_of_another_run_is_refused_with_what_differs(tmp_path, other, key):
    with pytest.raises(ValueError, match=rf"is of another run: {key}; restore"):
        read_record(written(tmp_path, *TWO_STEPS), other)


def test_a_setting_that_is_gone_since_is_not_compared(tmp_path):
    path = written(tmp_path, *TWO_STEPS)
    path.write_text(path.read_text().replace('"seed": 0', '"of_an_older_version": 7'))
    assert set(read_record(path, RUN)) == {1, 2}


def test_more_steps_than_there_are_ticks_are_refused_and_fewer_are_not(tmp_path):
    path = written(tmp_path, *TWO_STEPS)
    assert set(read_record(path, replace(RUN, steps=1))) == {1, 2}
    with pytest.raises(ValueError, match=r"has ticks of 2 steps: got steps = 3; set steps to what"):
        read_record(path, replace(RUN, steps=3))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="has ticks of 0 steps: got steps = 1"):
        read_record(path, replace(RUN, steps=1))


def test_a_file_that_is_no_record_is_told_from_one_that_is_not_there(tmp_path):
    append(tmp_path / "metrics.jsonl", [{"step": 1, "objective/loss": 0.0}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, which has no such record"):
        read_record(tmp_path / "metrics.jsonl", RUN)
    with pytest.raises(ValueError, match=r"none\.jsonl, which is not there"):
        read_record(tmp_path / "none.jsonl", RUN)


@pytest.mark.parametrize("deaths", [[1], [2], [1, 2]])
def test_how_far_a_record_with_a_death_repeats_is_said(tmp_path, caplog, deaths):
    rows = [row | ({"deaths": ["engine-1"]} if row["step"] in deaths else {}) for row in TWO_STEPS]
    read_record(written(tmp_path, *rows), RUN)
    assert f"an engine died in step {deaths[0]}; the run repeats itself up to there" in caplog.text
