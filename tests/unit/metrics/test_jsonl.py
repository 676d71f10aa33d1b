"""The files of a run folder: what is written of any value, what is left after a kill or a full disk."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from gspo_dist.metrics import jsonl
from gspo_dist.metrics.jsonl import MetricsFile, SamplesFile, append, cut_back, plain, read_jsonl, write_json


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (42, 42),
        (True, True),
        (None, None),
        ("x+1", "x+1"),
        ("\ud800", "\ud800"),
        (0.5, 0.5),
        (math.nan, None),
        (-math.inf, None),
        (Decimal("0.10"), "0.10"),
        (Fraction(1, 3), "1/3"),
        (date(2026, 1, 2), "2026-01-02"),
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
        (time(3, 4), "03:04:00"),
        (b"a\xff", "a\\xff"),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.array([1.0, math.nan]), [1.0, None]),
        (torch.tensor([1, 2]), [1, 2]),
        ({"value": Decimal("2"), 3: (1, {4})}, {"value": "2", "3": [1, [4]]}),
    ],
)
def test_any_value_of_a_data_file_has_a_json_form(value, written):
    assert plain(value) == written
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == written


def test_numbers_are_one_row_per_step_and_null_where_they_are_not_finite(tmp_path):
    file = MetricsFile(tmp_path)
    file.log(1, {"b": 2.0, "a": math.nan})
    file.log(2, {"a": np.float64(0.25), "b": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "a": null, "b": 2.0}\n{"step": 2, "a": 0.25, "b": null}\n'
    )


def test_samples_of_mixed_types_are_written(tmp_path):
    """Answers 42 and "x+1" in one file, and what Parquet gives."""
    file = SamplesFile(tmp_path)
    answers = [42, "x+1", Decimal("1.5"), date(2026, 1, 2), b"raw", None, {"a": [1]}]
    file.samples(3, [{"answer": answer, "reward": math.nan} for answer in answers])
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["answer"] for row in rows] == [42, "x+1", "1.5", "2026-01-02", "raw", None, {"a": [1]}]
    assert {(row["step"], row["reward"]) for row in rows} == {(3, None)}


def test_the_summary_is_written_whatever_it_holds(tmp_path):
    MetricsFile(tmp_path).close({"seconds": math.nan, "checkpoint": tmp_path, "steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "seconds": None,
        "checkpoint": str(tmp_path),
        "steps": 3,
    }


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "a', "{", "\x00\x00\x00", '{"step": 3}garbage', "17", '"text"', "nu"]
)
def test_a_torn_line_is_left_out_and_the_whole_rows_stay(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n' + torn + '\n{"step": 2}\n')  # of a disk that was full for a while
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_bytes_that_are_no_text_tear_a_line_and_nothing_else(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{"st')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
    cut_back(tmp_path / "m.jsonl", 1)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_resumed_run_goes_on_after_its_checkpoint_and_says_what_was_torn(tmp_path, caplog):
    """Killed while step 4 was written, resumed from the checkpoint of step 2: steps 3 and 4 come again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = "".join(json.dumps({"step": step, "a": step / 2}) + "\n" for step in range(4))
        (tmp_path / name).write_text(rows + '{"step": 4, "a')
    with caplog.at_level(logging.WARNING):
        metrics, samples = MetricsFile(tmp_path, completed_steps=2), SamplesFile(tmp_path, completed_steps=2)
    metrics.log(3, {"a": 9.0})
    samples.samples(3, [{"a": 9.0}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = read_jsonl(tmp_path / name)
        assert [(row["step"], row["a"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]
        assert f"{tmp_path / name}: 1 torn line(s) dropped, 4 whole rows are there" in caplog.text


def test_a_run_that_starts_over_keeps_no_row(tmp_path):
    for name, file in (("metrics.jsonl", MetricsFile), ("samples.jsonl", SamplesFile)):
        (tmp_path / name).write_text('{"step": 0}\n{"step": 1}\n')
        file(tmp_path)
        assert (tmp_path / name).read_text() == ""


def test_a_row_without_a_step_is_not_kept_and_no_error(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"note": "by hand"}\n')
    SamplesFile(tmp_path, completed_steps=5)
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1}]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from gspo_dist.metrics.jsonl import append
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
path = Path(sys.argv[1])
append(path, [{"step": 1, "text": "x" * 40}])
try:
    append(path, [{"step": 2, "text": "y" * 40}])
except OSError as error:
    print("refused", error.errno)
append(path, [{"step": 3}])
"""


def test_a_row_that_the_disk_does_not_take_leaves_no_half_of_itself(tmp_path):
    """A real limit of the system: row 2 goes over 100 bytes in its middle, row 3 fits again."""
    path = tmp_path / "samples.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"refused {errno.EFBIG}\n", done.stderr
    assert read_jsonl(path) == [{"step": 1, "text": "x" * 40}, {"step": 3}]
    assert path.read_text().count("\n") == 2


def test_metrics_that_cannot_be_written_say_the_way_out(tmp_path, monkeypatch):
    def full(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = MetricsFile(tmp_path)
    monkeypatch.setattr(jsonl, "append", full)
    with pytest.raises(OSError, match="No space left") as caught:
        file.log(1, {"a": 1.0})
    assert (
        "make room and repeat the command: it goes on from its last checkpoint" in caught.value.__notes__[0]
    )


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [2], "b": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_rows_are_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or sync(fd))
    append(tmp_path / "m.jsonl", [{"step": 1}])
    assert len(synced) == 1
