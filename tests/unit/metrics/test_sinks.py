"""A run's sinks as one: the record must be written, the rest may fail."""

from __future__ import annotations

import errno
import logging

import pytest

from gspo_dist.metrics.sinks import Sinks, going_on_without


class Recorder:
    """Keeps what it is told, or raises `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []

    def _take(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def log(self, step, row):
        self._take("log", step, dict(row))

    def samples(self, step, rows):
        self._take("samples", step, list(rows))

    def image(self, name, path):
        self._take("image", name, path)

    def close(self, summary):
        self._take("close", dict(summary))


FULL = OSError(errno.ENOSPC, "No space left on device")


def tell_all(sinks: Sinks, tmp_path) -> None:
    for step in (1, 2):
        sinks.samples(step, [{"prompt": "1+1"}])
        sinks.log(step, {"objective/loss": 0.5})
    sinks.image("curves", tmp_path / "curves.png")
    sinks.close({"steps": 2})


def test_every_sink_is_told_everything_in_order(tmp_path):
    record, other = Recorder(), Recorder()
    tell_all(Sinks(record, [other]), tmp_path)
    assert record.calls == other.calls
    assert [call[0] for call in record.calls] == ["samples", "log", "samples", "log", "image", "close"]
    assert record.calls[0] == ("samples", 1, [{"prompt": "1+1"}])
    assert record.calls[1] == ("log", 1, {"objective/loss": 0.5})
    assert record.calls[4:] == [("image", "curves", tmp_path / "curves.png"), ("close", {"steps": 2})]


@pytest.mark.parametrize("error", [FULL, ValueError("mixed types"), ConnectionError("gone"), RuntimeError()])
def test_a_sink_that_fails_is_said_once_per_kind_and_the_others_go_on(tmp_path, caplog, error):
    record, broken, last = Recorder(), Recorder(error), Recorder()
    with caplog.at_level(logging.WARNING):
        tell_all(Sinks(record, [broken, last]), tmp_path)
    assert broken.calls == record.calls == last.calls  # a sink that failed once may work again
    kinds = ("samples", "the step's numbers", "pictures", "the summary")
    assert caplog.messages == [
        f"the run goes on without {kind} in Recorder: {type(error).__name__}: {error}" for kind in kinds
    ]


def test_a_record_that_cannot_be_written_ends_the_run_at_that_step(tmp_path):
    record, other = Recorder(FULL), Recorder()
    with pytest.raises(OSError, match="No space left"):
        Sinks(record, [other]).log(1, {})
    assert other.calls == []  # no other sink has a step that the record lacks


def test_a_summary_that_cannot_be_written_ends_nothing(caplog):
    other = Recorder()
    Sinks(Recorder(FULL), [other]).close({"steps": 2})
    assert other.calls == [("close", {"steps": 2})]
    assert "the run goes on without the summary in Recorder: OSError" in caplog.text


def test_an_interrupt_is_no_failure_of_a_sink():
    class Interrupted(Recorder):
        def log(self, step, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks(Recorder(), [Interrupted()]).log(1, {})


def test_a_block_that_only_records_may_fail(caplog):
    with going_on_without("curves.png"):
        raise MemoryError("too large")
    assert "the run goes on without curves.png: MemoryError: too large" in caplog.text
