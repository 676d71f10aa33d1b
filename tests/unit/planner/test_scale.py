"""The scale report's own arithmetic: one store, failures with a way back, and where a design breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.benchmark_script import loaded


@pytest.fixture(scope="module")
def scale():
    with loaded("plan_scale") as script:
        yield script


@pytest.fixture(scope="module")
def small(scale):
    return scale.look(16)


def test_a_store_takes_in_what_it_holds_and_spills_the_rest(scale):
    assert scale.stored_s(10e9) == pytest.approx(5.0)
    full = 64 * 2**30
    assert scale.stored_s(full + 117e6) == pytest.approx(full / 2e9 + 1.0)


def test_without_failures_only_checkpoints_cost(scale):
    lost = scale.with_failures(100.0, 8, 50.0, 10, 1e12)
    assert lost == pytest.approx(50 / (10 * 100 + 50), rel=1e-6)


def test_failures_cost_the_way_back_and_what_is_repeated(scale):
    """One failure in 100 steps on average; half of them lose half of an interval and the start again."""
    steps, step_s, every, gpus = 4000, 100.0, 20, 8
    hours = gpus * 100 * step_s / 3600
    lost = scale.with_failures(step_s, gpus, 0.0, every, hours, steps=steps)
    each = 0.5 * (every / 2 * step_s + scale.STARTING_S) + 0.5 * min(step_s, scale.ENGINE_STARTING_S)
    expected = each / (100 * step_s + each)
    assert lost == pytest.approx(expected, rel=0.35)
    assert scale.with_failures(step_s, gpus, 0.0, every, hours / 10) > 3 * lost
    assert scale.with_failures(step_s, gpus, 0.0, 50, hours / 100) == 1.0  # it never gets on
    # Rare failures want rare checkpoints.
    assert scale.best_interval(step_s, 8, 50.0, 1e9)[0] == 50
    assert scale.best_interval(step_s, 8, 5.0, 40.0)[0] < 50


def test_limits_grow_with_the_processes_that_one_serves(scale, small):
    large = scale.look(64)
    assert large.star_s == pytest.approx(small.star_s * 4, rel=1e-9)  # 8 engines against 2
    assert large.publish_s < small.publish_s * 1.01
    assert large.traces_s == pytest.approx(4 * small.traces_s, rel=1e-9)
    assert large.driver_s > 3 * small.driver_s
    assert scale.look(16, call_s=0.01).driver_s == pytest.approx(small.driver_s * 0.01 / scale.CALL_S)
    assert 0.5 < large.step_s / small.step_s < 2.0  # the batch grows with the cluster


def test_a_design_breaks_where_it_takes_a_tenth_of_a_step(scale, small):
    sizes = [replace(small, gpus=n, star_s=n, step_s=1000.0, driver_s=1.0) for n in (64, 128, 256)]
    told = dict(scale.breaks(sizes))
    assert told["one exporter, engines one by one"] == "128 GPUs; 26% of a step at 256 GPUs"
    assert told["one driver that calls every process"] == "not up to 256; 0% of a step at 256 GPUs"
    assert "| 64 |" in scale.report(sizes, "scale.png", "python benchmarks/plan_scale.py")
