"""The figures of a report: which are drawn, from which metrics, and what a failure costs."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from matplotlib.figure import Figure

from gspo_dist.metrics.names import metric_of
from gspo_dist.studies import figures
from gspo_dist.studies.analysis import load_runs
from gspo_dist.studies.figures import PICTURES, by_arm, draw_all, peak_memory


@pytest.fixture
def complete_run(make_run):
    """A run with every metric that a figure shows, and the keys that were asked for."""
    asked = set()

    def make(arm):
        run = make_run(arm, 0, [0.3, 0.4, 0.5])
        rows = [row | {"routing/update/flip_fraction/layer_00": 0.1 * row["step"]} for row in run.rows]
        run = dataclasses.replace(run, rows=rows)

        class Recording(type(run)):
            def series(self, key):
                asked.add(key)
                return super().series(key)

        return Recording(**vars(run)), asked

    return make


@pytest.mark.slow
def test_figures_that_have_data_are_written(written_study, tmp_path):
    written = draw_all(written_study, load_runs(written_study), tmp_path / "figures")
    assert [path.name for path in written.values()] == [
        "learning.png",
        "clipping.png",
        "contract.png",
        "cost.png",
    ]
    for path in written.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {p.name for p in written.values()}


def test_every_metric_of_a_figure_is_one_that_runs_log(complete_run):
    run, asked = complete_run("gspo")
    for picture in PICTURES:
        picture.draw(Figure(), {"gspo": [run]})
    assert len(asked) > 20
    assert [key for key in asked if metric_of(key) is None] == []


@pytest.mark.slow
def test_a_figure_that_fails_is_said_and_costs_no_other(written_study, tmp_path, monkeypatch, caplog):
    def broken(figure, arms):
        raise RuntimeError("no font")

    changed = (dataclasses.replace(PICTURES[0], draw=broken), *PICTURES[1:])
    monkeypatch.setattr(figures, "PICTURES", changed)
    with caplog.at_level(logging.WARNING):
        written = draw_all(written_study, load_runs(written_study), tmp_path / "figures")
    assert [path.name for path in written.values()] == ["clipping.png", "contract.png", "cost.png"]
    assert "learning.png is left out of the report: RuntimeError: no font" in caplog.text


def test_lines_are_means_over_seeds_at_their_steps(make_run):
    figure = Figure()
    runs = {"a": [make_run("a", 0, [0.2, 0.4]), make_run("a", 1, [0.4, 0.8])]}
    PICTURES[0].draw(figure, runs)
    line = figure.axes[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_label()) == ([0.0, 1.0], "a")
    assert np.allclose(line.get_ydata(), [0.3, 0.6], atol=1e-12)


def test_minutes_count_training_only(make_run):
    """Steps of 60 s with 6 s of flips each: 0.9, 1.8 and 2.7 minutes; row 0 is the evaluation before."""
    run = make_run("a", 0, [0.1] * 4)
    rows = [row | ({"time/step_s": 60.0, "time/flips_s": 6.0} if row["step"] else {}) for row in run.rows]
    figure = Figure()
    PICTURES[0].draw(figure, {"a": [dataclasses.replace(run, rows=rows)]})
    assert np.allclose(figure.axes[2].lines[0].get_xdata(), [0.0, 0.9, 1.8, 2.7], atol=1e-12)


def test_layers_are_drawn_in_order_of_their_number(make_run):
    """Layer 100 comes after layer 20, as no sorting by letters would have it."""
    layers = {f"routing/update/flip_fraction/layer_{n:02d}": n / 1000 for n in (3, 20, 100)}
    figure = Figure()
    assert figures._layers(figure.add_subplot(), {"a": [make_run("a", 0, [0.1], **layers)]})
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), [0.003, 0.02, 0.1], atol=1e-12)


def test_peak_memory_adds_up_processes(make_run):
    summary = {"peak_memory_bytes": {"learner-0": {"host": 3, "gpu": 50}, "engine-0": {"host": 4}}}
    assert peak_memory(dataclasses.replace(make_run("a", 0, [0.1]), summary=summary)) == 7.0
    assert np.isnan(peak_memory(make_run("a", 0, [0.1])))


def test_arms_keep_the_order_of_the_study(written_study):
    assert list(by_arm(written_study, load_runs(written_study)[::-1])) == ["gspo", "grpo"]


@pytest.mark.parametrize("count", [8, 9, 21])
def test_every_arm_has_a_line_of_its_own_and_a_crowd_its_legend_beside_the_panels(make_run, count):
    figure = Figure()
    PICTURES[0].draw(figure, {f"arm{i}": [make_run(f"arm{i}", 0, [0.2, 0.4])] for i in range(count)})
    axis, crowded = figure.axes[0], count > 8
    lines = {(line.get_color(), line.get_linestyle()) for line in axis.lines}
    assert len(axis.lines) == len(lines) == count
    assert (len(axis.collections), len(figure.legends)) == ((0, 1) if crowded else (count, 0))
    legend = figure.legends[0] if crowded else axis.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [f"arm{i}" for i in range(count)]
