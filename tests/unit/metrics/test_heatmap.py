"""The heat map of routing flips: which way is up, and what a colour means."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from gspo_dist.metrics.heatmap import draw_heatmap

BRIGHT = np.array([0.988, 1.0, 0.644])  # inferno at 1
DARK = np.array([0.0015, 0.0005, 0.0139])  # inferno at 0


def share(path, colour) -> tuple[float, np.ndarray, np.ndarray]:
    """How many pixels left of the colour bar have `colour`, and where."""
    picture = matplotlib.image.imread(path)[..., :3]
    picture = picture[:, : picture.shape[1] * 3 // 4]
    hits = np.abs(picture - colour).max(-1) < 0.02
    y, x = np.nonzero(hits)
    return float(hits.mean()), y, x


def test_the_heat_map_draws_layers_upwards_and_steps_rightwards(tmp_path):
    rates = np.zeros((4, 3))
    rates[3, 2] = 1.0  # the last step and layer: the upper right cell; the other eleven are dark
    draw_heatmap(tmp_path / "map.png", np.arange(4), rates, title="", ceiling=1.0)
    bright, y, x = share(tmp_path / "map.png", BRIGHT)
    dark, dark_y, dark_x = share(tmp_path / "map.png", DARK)
    assert bright > 0.01
    assert dark > 5 * bright
    assert x.mean() > dark_x.mean()
    assert y.mean() < dark_y.mean()


def test_the_ceiling_fixes_the_scale_and_is_the_largest_rate_by_default(tmp_path):
    rates = np.full((2, 2), 0.1)
    draw_heatmap(tmp_path / "own.png", np.arange(2), rates, title="")
    draw_heatmap(tmp_path / "fixed.png", np.arange(2), rates, title="", ceiling=1000.0)
    assert share(tmp_path / "own.png", BRIGHT)[0] > 0.3
    assert share(tmp_path / "fixed.png", DARK)[0] > 0.3


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_that_differs_is_no_error(tmp_path, value):
    draw_heatmap(tmp_path / "map.png", np.arange(2), np.full((2, 2), value), title="")
    dark = share(tmp_path / "map.png", DARK)[0]
    assert (dark > 0.3) == (value == 0.0)  # nan rows stay white


@pytest.mark.parametrize(
    ("steps", "rates"),
    [(np.zeros(0), np.zeros((0, 3))), (np.zeros(2), np.zeros((3, 3))), (np.zeros(2), np.zeros(2))],
)
def test_nothing_to_draw_is_refused(tmp_path, steps, rates):
    with pytest.raises(ValueError, match="heat map needs rates"):
        draw_heatmap(tmp_path / "none.png", steps, rates, title="")
    assert not list(tmp_path.iterdir())
