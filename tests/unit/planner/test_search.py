"""A search offers what fits and what the run accepts, the fastest first, and says what limits each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_dist.config import PlanConfig
from gspo_dist.planner.pipeline import Lengths
from gspo_dist.planner.search import search
from gspo_dist.planner.text import format_found
from tests.unit.planner.views import H100, LEARNER, QWEN, change, engine_of, run_of, work_of

WORK = work_of(16, 8, prompt=512, completion=1024, mini_batches=2)
RUN = run_of(change(LEARNER, token_budget=8192), engine_of(4, 2, precision="bf16"), WORK)


@pytest.fixture(scope="module")
def found():
    return search(RUN, QWEN, H100, 2, 8, most_ahead=1)


def values(one):
    return dict(word.split("=") for word in one.overrides)


def test_ten_are_offered_the_fastest_first_and_all_fit(found):
    assert len(found) == 10
    seconds = [one.outcome.step_s for one in found]
    assert seconds == sorted(seconds)
    for one in found:
        assert one.plan.fits
        assert one.plan.learner.free >= 0.05 * H100.memory
        given = values(one)
        ranks = int(given["learner.world_size"])
        engines = int(given["rollout.engines"]) * int(given["rollout.tensor_parallel"])
        assert (engines if given["cluster.colocated"] == "true" else ranks + engines) == 16
        assert one.tokens_per_s_per_gpu == pytest.approx(WORK.tokens / one.outcome.step_s / 16)


def test_a_search_beats_what_it_began_with(found):
    from gspo_dist.planner.plan import plan

    own = plan(RUN, QWEN, H100, 2, 8)
    assert found[0].outcome.step_s < own.step.total_s


def test_what_the_run_refuses_is_not_offered(found):
    assert any(values(one)["learner.megatron.pipeline_parallel"] != "1" for one in found)

    def no_pipeline(layout):
        return ["no pipeline here"] if layout.pipeline > 1 else []

    held = search(RUN, QWEN, H100, 2, 8, most_ahead=0, refusals=no_pipeline)
    assert held
    assert {values(one)["learner.megatron.pipeline_parallel"] for one in held} == {"1"}
    assert {values(one)["rollout.steps_ahead"] for one in held} == {"0"}
    assert search(RUN, QWEN, H100, 2, 8, refusals=lambda layout: ["no"]) == []
    # The next best takes the place of what is refused: here each size's own best.
    best = {
        values(one)["learner.world_size"]: values(one)["learner.megatron.tensor_parallel"] for one in found
    }
    assert set(best.values()) == {"1"}
    cut = search(
        RUN, QWEN, H100, 2, 8, most_ahead=0, refusals=lambda layout: ["cut it"] if layout.tensor == 1 else []
    )
    assert cut
    assert "1" not in {values(one)["learner.megatron.tensor_parallel"] for one in cut}


def test_nothing_is_offered_where_nothing_fits():
    assert search(RUN, QWEN, replace(H100, memory_gib=10.0), 1, 8) == []
    assert format_found([]).startswith("nothing fits")


def test_lengths_and_networks_are_those_of_the_user(found):
    short = search(RUN, QWEN, H100, 2, 8, most_ahead=1, lengths=Lengths(100, 0.1, 1024))
    assert short[0].outcome.step_s < 0.7 * found[0].outcome.step_s
    slow = replace(RUN, plan=PlanConfig(network_gb_s=1.0))
    # What shares its GPUs sends over all cards of a node: of 60 GB, 8 each.
    assert search(slow, QWEN, H100, 2, 8, most_ahead=1)[0].outcome.step_s > found[0].outcome.step_s + 8


def test_the_table_names_the_limit_and_the_overrides(found):
    text = format_found(found)
    assert text.count("learner.world_size=") == 10
    for one in found:
        assert one.limit in text
    bound = [one for one in found if one.outcome.steps_ahead == 1]
    for one in bound:
        waits_for_engines = one.outcome.learner_idle > one.outcome.engine_idle
        assert one.limit.startswith("engines" if waits_for_engines else "learner")


def test_colocated_layouts_are_offered():
    """A small model on one host: engines beside the ranks fit, and are among what is found."""
    small = replace(QWEN, layers=12, expert_layers=(True,) * 12)
    half = replace(RUN, rollout=replace(RUN.rollout, gpu_memory_utilization=0.5))
    few = search(half, small, H100, 1, 8, most_ahead=0)
    shared = [one for one in few if values(one)["cluster.colocated"] == "true"]
    assert shared
    assert {int(values(one)["learner.world_size"]) for one in shared} == {8}
    assert "8+shared" in format_found(few).replace(" ", "")
