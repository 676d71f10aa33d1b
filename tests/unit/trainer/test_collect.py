"""Which prompts a step takes, how they are sampled, and how completions become rollouts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from gspo_dist.rewards.reward import Judged
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.collect import collect, judged, sampling_of
from gspo_dist.types import SamplingSpec
from tests.unit.trainer.small import rollout

SAMPLING = SamplingSpec(n=2, max_tokens=8, seed=7, record_routing=True)


class Pool:
    """Gives every prompt two completions, named after the request's id."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], SamplingSpec, list[int]]] = []

    def generate(self, prompts, spec, request_ids):
        self.asked.append(([p.prompt_id for p in prompts], spec, list(request_ids)))
        return [
            [replace(rollout(0).completion, text=f"{r}.{i}") for i in range(spec.n)]
            for _, r in zip(prompts, request_ids, strict=True)
        ]


class Judge:
    """Pays the rollout's id."""

    def judge(self, items):
        return [Judged(float(i), {"part": float(i) / 2}) for i, _, _ in items]


def run_of(*, replay: str = "none", measured: bool = False, sampling: SamplingSpec = SAMPLING):
    prompts = iter([rollout(i).prompt for i in range(99)])
    return SimpleNamespace(
        config=SimpleNamespace(
            rollout=SimpleNamespace(prompts_per_step=3), objective=SimpleNamespace(routing_replay=replay)
        ),
        cursor=SimpleNamespace(next=lambda n: [next(prompts) for _ in range(n)]),
        pool=Pool(),
        rewards=Judge(),
        flips=SimpleNamespace(due=lambda step: measured),
        sampling=sampling,
        clock=StepClock(),
    )


def test_ids_count_over_the_run_so_that_a_step_repeats_wherever_it_starts():
    run = run_of()
    rollouts = collect(run, step=5)  # steps 1 to 4 had groups 0 to 11
    assert run.pool.asked[0][0] == ["p0", "p1", "p2"]
    assert run.pool.asked[0][2] == [12, 13, 14]
    assert [r.group_id for r in rollouts] == [12, 12, 13, 13, 14, 14]
    assert [r.rollout_id for r in rollouts] == [24, 25, 26, 27, 28, 29]
    assert [r.completion.text for r in rollouts] == ["12.0", "12.1", "13.0", "13.1", "14.0", "14.1"]
    assert [r.reward for r in rollouts] == [24.0, 25.0, 26.0, 27.0, 28.0, 29.0]
    assert rollouts[3].reward_parts == {"part": 13.5}
    assert [r.prompt.prompt_id for r in rollouts] == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_a_step_may_have_one_prompt():
    completions = [rollout(i).completion for i in range(2)]
    rollouts = judged(Judge(), [rollout(0).prompt], [completions], 3)
    assert [(r.group_id, r.rollout_id, r.reward) for r in rollouts] == [(3, 6, 6.0), (3, 7, 7.0)]


def test_sampling_and_judging_are_timed_apart():
    run = run_of()
    collect(run, 1)
    assert {"time/collect_s", "time/reward_s"} <= set(run.clock.metrics())


@pytest.mark.parametrize(
    ("replay", "measured", "records"),
    [("none", False, False), ("none", True, True), ("r2", False, False), ("r3", False, True)],
)
def test_routes_travel_where_they_are_replayed_or_measured(replay, measured, records):
    assert sampling_of(run_of(replay=replay, measured=measured), 1) == replace(
        SAMPLING, record_routing=records
    )


def test_an_engine_that_records_nothing_is_not_asked_to():
    run = run_of(measured=True, sampling=replace(SAMPLING, record_routing=False))
    assert not sampling_of(run, 1).record_routing


def test_the_worked_example_of_the_ids():
    completions = [[rollout(0).completion] * 2] * 2
    out = judged(Judge(), [rollout(0).prompt, rollout(1).prompt], completions, 3)
    assert [r.group_id for r in out] == [3, 3, 4, 4]
    assert [r.rollout_id for r in out] == [6, 7, 8, 9]


def test_a_pool_that_loses_a_verdict_or_a_group_is_not_trained_on():
    lost = SimpleNamespace(judge=lambda items: [Judged(0.0, {})] * (len(items) - 1))
    groups = [[rollout(0).completion] * 2] * 2
    with pytest.raises(ValueError, match="shorter"):
        judged(lost, [rollout(0).prompt, rollout(1).prompt], groups, 0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        judged(Judge(), [rollout(0).prompt], groups, 0)
