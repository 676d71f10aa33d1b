"""The step's clock, by a clock of its own."""

from __future__ import annotations

import pytest

from gspo_dist.trainer import clock as module
from gspo_dist.trainer.clock import StepClock


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """Seconds that the test moves by hand."""
    at = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: at[0])
    return at


def test_spans_of_one_name_add_up_and_the_rest_is_other(now):
    clock = StepClock()
    for seconds in (1.0, 2.5):
        with clock("update"):
            now[0] += seconds
    with clock("sync"):
        now[0] += 0.25
    now[0] += 4.0
    assert clock.metrics() == {
        "time/update_s": 3.5,
        "time/sync_s": 0.25,
        "time/step_s": 7.75,
        "time/other_s": 4.0,
    }


def test_a_block_that_raises_is_counted(now):
    clock = StepClock()

    def fails() -> None:
        with clock("collect"):
            now[0] += 3.0
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert clock.metrics()["time/collect_s"] == 3.0


def test_a_restart_forgets_the_step_before(now):
    clock = StepClock()
    with clock("collect"):
        now[0] += 3.0
    clock.restart()
    now[0] += 0.25
    assert clock.metrics() == {"time/step_s": 0.25, "time/other_s": 0.25}


def test_asking_changes_nothing(now):
    clock = StepClock()
    with clock("collect"):
        now[0] += 3.0
    assert clock.metrics() == clock.metrics()


def test_spans_that_overlap_leave_no_negative_rest(now):
    clock = StepClock()
    with clock("update"), clock("sync"):
        now[0] += 2.0
    assert clock.metrics()["time/other_s"] == 0.0
