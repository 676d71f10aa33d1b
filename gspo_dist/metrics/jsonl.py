"""The files of a run folder that hold one JSON object per line, and how a resumed run takes them up.

metrics.jsonl must be written, samples.jsonl need not. A run that cannot write its metrics stops, with the
last checkpoint whole. Going on would leave a hole in what resuming, curves and reports read. It would also
pay for steps that cannot be kept, because the next checkpoint goes to the same disk and is far larger.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from gspo_dist.files import write_text
from gspo_dist.metrics.sinks import Row, SampleRow

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"


class MetricsFile:
    """metrics.jsonl, one object per step, and summary.json at the end: the record of a run."""

    def __init__(self, folder: Path, completed_steps: int = 0) -> None:
        """Cuts the file back to `completed_steps`: what a resumed run repeats is logged again."""
        self.folder = folder
        cut_back(folder / METRICS, completed_steps)

    def log(self, step: int, row: Row) -> None:
        """Appends the row; numbers that are not finite become null. Raises OSError on a full disk."""
        numbers = {key: plain(value) for key, value in sorted(row.items())}
        try:
            append(self.folder / METRICS, [{"step": step, **numbers}])
        except OSError as error:
            error.add_note(
                f"{self.folder / METRICS} cannot be written, and it is the record that a run is resumed by; "
                "make room and repeat the command: it goes on from its last checkpoint"
            )
            raise

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """SamplesFile has them."""

    def collecting(self, step: int, row: Row) -> None:
        """The step's own numbers say it better, once they are there."""

    def event(self, step: int, text: str) -> None:
        """events.jsonl has them."""

    def image(self, name: str, path: Path) -> None:
        """Pictures lie in the run folder already."""

    def abandon(self) -> None:
        """Every row is on the disk."""

    def close(self, summary: Mapping[str, object]) -> None:
        """Writes summary.json."""
        write_json(self.folder / SUMMARY, plain(summary))


class SamplesFile:
    """samples.jsonl: a few rollouts per step."""

    def __init__(self, folder: Path, completed_steps: int = 0) -> None:
        """Cuts the file back to `completed_steps`."""
        self.path = folder / SAMPLES
        cut_back(self.path, completed_steps)

    def log(self, step: int, row: Row) -> None:
        """MetricsFile has the numbers."""

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Appends the rows, whatever types their values have. Raises OSError on a full disk."""
        append(self.path, [{"step": step, **plain(row)} for row in rows])

    def collecting(self, step: int, row: Row) -> None:
        """No samples are ready."""

    def event(self, step: int, text: str) -> None:
        """events.jsonl has them."""

    def image(self, name: str, path: Path) -> None:
        """Pictures lie in the run folder already."""

    def abandon(self) -> None:
        """Every sample is on the disk."""

    def close(self, summary: Mapping[str, object]) -> None:
        """Every sample is on the disk."""


def plain(value: Any) -> Any:
    """`value` as JSON has it; what JSON has no type for becomes a text, and a number that is not finite null.

    Examples: Decimal("0.10") -> "0.10", date(2026, 1, 2) -> "2026-01-02", b"x\\xff" -> "x\\\\xff", nan ->
    None, {1: (2, 3)} -> {"1": [2, 3]}, numpy and torch values -> numbers and lists.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if callable(getattr(value, "tolist", None)):  # arrays and scalars of numpy, tensors
        return plain(value.tolist())
    return str(value)


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows that are `plain`, and waits until the disk has them.

    Raises OSError when it does not take them; the file is then as it was, not torn in the middle of a row.
    """
    left = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
    # Without a buffer, which would write its rest again when the file is closed, after the cut below.
    with open(path, "ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), whole)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; none where there is no file.

    A line that is no JSON object is left out: a kill, or a machine that lost power, tears the last one.
    """
    return _whole_rows(_lines(path)) if path.is_file() else []


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _whole_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def cut_back(path: Path, completed_steps: int) -> None:
    """Leaves the whole rows up to `completed_steps`, none for 0. A torn line is dropped and said."""
    if not path.is_file():
        return
    lines = _lines(path)
    rows = _whole_rows(lines)
    torn = len(lines) - len(rows)
    if torn and completed_steps:
        log.warning("%s: %d torn line(s) dropped, %d whole rows are there", path, torn, len(rows))
    kept = [row for row in rows if completed_steps and row.get("step", math.inf) <= completed_steps]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def write_json(path: Path, value: object) -> None:
    """Writes a value that JSON has types for: a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
