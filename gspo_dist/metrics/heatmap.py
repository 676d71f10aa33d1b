"""The picture of routing flips: MoE layer by step, brighter = more of the activated experts differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gspo_dist.files import replacing


def draw_heatmap(
    path: Path, steps: np.ndarray, rates: np.ndarray, *, title: str, ceiling: float | None = None
) -> None:
    """Writes a PNG of `rates` [N, L] (N measurements, L MoE layers) over `steps` [N].

    Rows of equal step are consecutive mini-batches. Rows of nan stay white. `ceiling` is the rate of the
    brightest colour, by default the largest rate drawn; pictures that are to be compared need the same one.
    May be called again: the file is replaced at once. Raises ValueError when there is nothing to draw,
    OSError when the file cannot be written.
    """
    if rates.ndim != 2 or len(rates) == 0 or len(steps) != len(rates):
        raise ValueError(
            f"heat map needs rates [N, L] with N >= 1 and N steps: got {list(rates.shape)}, {len(steps)}"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global pyplot state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns, layers = rates.shape
    size = (min(16.0, 7.5 + 0.08 * columns), min(12.0, 3.0 + 0.12 * layers))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = ceiling if ceiling is not None else float(np.nanmax(rates)) if np.isfinite(rates).any() else 1.0
    image = axes.imshow(
        rates.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="inferno",
        vmin=0.0,
        vmax=top or 1.0,  # a scale from 0 to 0 has no colours
    )
    ticks = np.unique(np.linspace(0, columns - 1, num=min(columns, 12)).round().astype(int))
    axes.set_xticks(ticks, [str(int(steps[tick])) for tick in ticks])
    axes.set_xlabel("step")
    axes.set_ylabel("MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="share that differs")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
