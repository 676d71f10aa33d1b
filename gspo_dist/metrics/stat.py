"""Numbers that merge exactly over micro-batches and ranks: a value, its weight, and how two combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "min", "max", "concat")


@dataclass(frozen=True, eq=False)
class Stat:
    """A sufficient statistic. Value and weight are detached and float64.

    Example: the mean of [1, 3] is value 4 and weight 2. Merged with the mean of [8], value 8 and weight 1, it
    is value 12 and weight 3, whose result is 4: the mean of all three.
    Raises ValueError for an unknown reduction.
    """

    value: Tensor
    """mean: the sum of w x. sum: the sum. min, max: the extreme, +-inf when empty. concat: the items, [n]."""
    weight: Tensor
    """mean: the sum of w. Else: how many items there were."""
    reduce: str
    """mean | sum | min | max | concat.

    concat is for what does not merge, such as quantiles. Ranks that hold parts of the same sequences repeat
    their items, which moves no quantile."""

    def __post_init__(self) -> None:
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"stat.reduce must be one of {', '.join(REDUCTIONS)}: got {self.reduce!r}")

    @classmethod
    def mean(cls, x: Tensor, weight: Tensor | None = None) -> Stat:
        """Mean of x (numbers or bool) with weights (or a bool mask) of the same shape."""
        x = x.detach()
        if weight is None:
            return cls(_total(x), _scalar(x.numel(), x), "mean")
        # Bools are counted as bools, see _total; `*` would make them integers.
        both_bool = x.dtype == torch.bool and weight.dtype == torch.bool
        weighted = x & weight if both_bool else x * weight
        return cls(_total(weighted), _total(weight), "mean")

    @classmethod
    def sum(cls, x: Tensor) -> Stat:
        """Sum of x, of any shape."""
        return cls(x.detach().sum(dtype=torch.float64), _scalar(x.numel(), x), "sum")

    @classmethod
    def min(cls, x: Tensor) -> Stat:
        """Smallest of x; +inf, the neutral element, when x is empty."""
        value = x.detach().double()
        return cls(value.min() if x.numel() else _scalar(float("inf"), x), _scalar(x.numel(), x), "min")

    @classmethod
    def max(cls, x: Tensor) -> Stat:
        """Largest of x; -inf, the neutral element, when x is empty."""
        value = x.detach().double()
        return cls(value.max() if x.numel() else _scalar(float("-inf"), x), _scalar(x.numel(), x), "max")

    @classmethod
    def concat(cls, x: Tensor) -> Stat:
        """The items of x [n] themselves."""
        return cls(x.detach().double(), _scalar(x.numel(), x), "concat")

    def cpu(self) -> Stat:
        """On the host: what travels between processes."""
        return Stat(self.value.cpu(), self.weight.cpu(), self.reduce)

    def result(self) -> float:
        """The number to log; nan for a mean, min or max over nothing. Raises ValueError for concat."""
        if self.reduce == "concat":
            raise ValueError(
                f"a concat stat is no single number: it holds {self.value.numel()}; read its value"
            )
        weight = float(self.weight)
        if self.reduce == "sum":
            return float(self.value)
        if weight == 0:
            return float("nan")
        return float(self.value) / weight if self.reduce == "mean" else float(self.value)


def merge_stats(parts: Sequence[dict[str, Stat]]) -> dict[str, Stat]:
    """The statistics of the union of the parts. A name may be missing from some of them.

    Raises ValueError if a name has two reductions.
    """
    merged: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            merged[name] = _merge(name, merged[name], stat) if name in merged else stat
    return merged


def _merge(name: str, a: Stat, b: Stat) -> Stat:
    if a.reduce != b.reduce:
        raise ValueError(f"stat {name} must have one reduction: got {a.reduce} and {b.reduce}")
    if a.reduce == "concat":
        return Stat(torch.cat([a.value, b.value]), a.weight + b.weight, a.reduce)
    combine = {"min": torch.minimum, "max": torch.maximum}.get(a.reduce, torch.add)
    return Stat(combine(a.value, b.value), a.weight + b.weight, a.reduce)


def results(stats: dict[str, Stat]) -> dict[str, float]:
    """name -> number, of every statistic that is one (not concat)."""
    return {name: stat.result() for name, stat in stats.items() if stat.reduce != "concat"}


def _total(x: Tensor) -> Tensor:
    # Counting bools as integers is four times as fast as adding them as float64, and as exact.
    return x.sum().double() if x.dtype == torch.bool else x.sum(dtype=torch.float64)


def _scalar(x: float, like: Tensor) -> Tensor:
    return torch.tensor(float(x), dtype=torch.float64, device=like.device)
