"""curves.png: what is drawn, and that every key is one that runs log."""

from __future__ import annotations

import matplotlib.figure
import pytest

from gspo_dist.metrics.curves import PANELS, draw_curves
from gspo_dist.metrics.names import metric_of

ROWS = [
    {"step": 0, "eval/heldout/accuracy": 0.4},
    {"step": 1, "rollout/reward_mean": 0.5, "mismatch/k3_kl": 1e-5, "objective/entropy": None},
    {"step": 2, "rollout/reward_mean": 0.7, "mismatch/k3_kl": 2e-5, "eval/heldout/accuracy": 0.9},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, without the time that rendering takes."""
    saved = []

    def keep(figure, path, **_):
        saved.append(figure)
        path.touch()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def test_every_key_of_a_panel_is_one_that_runs_log():
    assert [key for panel in PANELS for key in panel.keys if metric_of(key) is None] == []


def test_lines_are_the_rows_that_have_the_key(tmp_path, drawn):
    draw_curves(ROWS, tmp_path / "curves.png", "a run")
    lines = {axis.get_title(): axis.lines for axis in drawn[0].axes}
    reward = lines["training reward"][0]
    assert (list(reward.get_xdata()), list(reward.get_ydata())) == ([1, 2], [0.5, 0.7])
    assert list(lines["held-out accuracy"][0].get_xdata()) == [0, 2]
    assert len(lines["entropy (nats per token)"]) == 0  # its one value was not finite


@pytest.mark.parametrize(("lowest", "scale"), [(1e-9, "log"), (0.0, "linear")])
def test_the_mismatch_is_logarithmic_where_it_is_positive(tmp_path, drawn, lowest, scale):
    rows = [*ROWS, {"step": 3, "mismatch/k3_kl": lowest}]
    draw_curves(rows, tmp_path / "curves.png")
    assert drawn[0].axes[3].get_yscale() == scale


def test_a_run_without_rows_has_empty_panels(tmp_path, drawn):
    draw_curves([], tmp_path / "curves.png")
    assert [len(axis.lines) for axis in drawn[0].axes] == [0] * 6


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    draw_curves(ROWS, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(figure, target, **_):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw_curves(ROWS, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
