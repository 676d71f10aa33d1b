"""The console's line per step."""

from __future__ import annotations

import io
import math

from rich.console import Console

from gspo_dist.metrics.console import COLUMNS, ConsoleSink
from gspo_dist.metrics.names import metric_of


def lines(*rows: tuple[int, dict]) -> list[str]:
    out = io.StringIO()
    sink = ConsoleSink(10, console=Console(file=out, width=200, force_terminal=False))
    for step, row in rows:
        sink.log(step, row)
    sink.close({})
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_it_begins_with_a_line_for_every_process():
    out = io.StringIO()
    places = ["learner-0 node1 10.0.0.1 gpu=0 replica=0", "engine-0 node2 10.0.0.2 gpu=0,1"]
    ConsoleSink(10, console=Console(file=out, width=20, force_terminal=False), places=places)
    assert out.getvalue().splitlines() == places


def test_every_column_is_a_metric_that_runs_log():
    assert [key for _, key, _ in COLUMNS if metric_of(key) is None] == []


def test_a_line_has_the_columns_that_the_row_has():
    row = {
        "rollout/reward_mean": 0.5,
        "perf/tokens_per_s": 12345.6,
        "time/left_s": 90.0,
        "objective/loss": 1.0,
    }
    assert lines((3, row)) == ["    3/10  reward 0.500  tok/s 12,346  left 1.5 min"]


def test_what_is_not_a_number_has_no_column():
    assert lines((0, {"eval/heldout/accuracy": math.nan, "learner/grad_norm": 2.0})) == [
        "    0/10  grad 2.00"
    ]


def test_nothing_is_shown_before_the_first_step():
    assert lines() == []
