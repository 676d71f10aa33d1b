"""A value with its reduction: merging parts gives the statistics of the whole."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_dist.metrics.stat import Stat, merge_stats, results

F64 = torch.float64


def test_merged_statistics_equal_those_of_the_union():
    x = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(1))
    w = torch.rand(50, dtype=F64, generator=torch.Generator().manual_seed(2))
    cuts = (x[:0], x[:7], x[7:8], x[8:]), (w[:0], w[:7], w[7:8], w[8:])
    parts = [
        {"mean": Stat.mean(a, b), "sum": Stat.sum(a), "min": Stat.min(a), "max": Stat.max(a)}
        for a, b in zip(*cuts, strict=True)
    ]
    merged = merge_stats([{}, *parts])
    assert merged["mean"].result() == pytest.approx(((x * w).sum() / w.sum()).item(), rel=1e-13)
    assert merged["sum"].result() == pytest.approx(x.sum().item(), rel=1e-13)
    assert (merged["min"].result(), merged["max"].result()) == (x.min().item(), x.max().item())


def test_statistics_over_nothing_and_mixed_reductions():
    empty = torch.zeros(0)
    assert math.isnan(Stat.mean(empty).result())
    assert math.isnan(Stat.max(empty).result())
    assert Stat.sum(empty).result() == 0.0
    with pytest.raises(ValueError, match="stat loss must have one reduction: got sum and mean"):
        merge_stats([{"loss": Stat.sum(torch.ones(1))}, {"loss": Stat.mean(torch.ones(1))}])
    with pytest.raises(
        ValueError, match=r"stat\.reduce must be one of mean, sum, min, max, concat: got 'median'"
    ):
        Stat(torch.ones(()), torch.ones(()), "median")


def test_concat_keeps_the_items_and_quantiles_of_them_do_not_depend_on_the_split():
    whole = torch.arange(7, dtype=F64)
    parts = [{"v": Stat.concat(whole[:3])}, {"v": Stat.concat(whole[3:])}]
    merged = merge_stats(parts)["v"]
    assert merged.value.tolist() == whole.tolist()
    assert float(merged.weight) == 7
    assert results({"v": merged}) == {}
    with pytest.raises(ValueError, match="holds 7"):
        merged.result()
