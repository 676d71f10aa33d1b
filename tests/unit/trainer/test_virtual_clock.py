"""Law 26: the planner's model of rollouts begun ahead against runs of the real parts on a virtual clock,
exactly.

Real are the collector, the pool's books and the reference engines; a decode step of n sequences takes
STEP_S[n] of virtual time. The model gets the lengths that came out, and must say when every step ended and
which policy sampled every completion first.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.planner.pipeline import Machine, simulate
from gspo_dist.rollout import reference
from gspo_dist.rollout.fleet import Fleet
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer.clockwork import SLICE_S, Clockwork, Slice
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.types import Prompt, SamplingSpec
from tests.unit.rollout.table_policy import TablePolicy

# Sums of powers of two, so that times add up without rounding.
STEP_S = [0.0, *(1 / 32 + n / 512 for n in range(1, 200))]
LEARN_S, PUBLISH_S = 1.5, 0.125
PROMPTS, GROUP, LIMIT, STEPS, MINI_BATCHES = 3, 2, 120, 7, 4


class TimedEngine(ReferenceEngine):
    """Counts virtual seconds: a tick takes as long as its sequences are many."""

    clock = 0.0

    def _tick(self, rows) -> None:
        if rows is self.rows[0]:
            self.clock += STEP_S[sum(int((~r.finished).sum()) for r in self.rows)]
        super()._tick(rows)


class TimedFleet(Fleet):
    """Engines side by side in virtual time: a call ends when the last of them has answered."""

    runs_beside = False

    def __init__(self, engines: int, monkeypatch) -> None:
        super().__init__([f"engine-{i}" for i in range(engines)], 1.0)
        config = RolloutConfig(precision="fp32", max_prompt_tokens=8, max_completion_tokens=LIMIT)
        self.made = {
            name: TimedEngine(config, TablePolicy(0, vocab_size=24), name=name) for name in self.names
        }
        self.now, self.calling = 0.0, ""
        clock = SimpleNamespace(monotonic=lambda: self.made[self.calling].clock)
        monkeypatch.setattr(reference, "time", clock)

    def each(self, method, arguments, timeout):
        answers = {}
        for name, own in arguments.items():
            engine, self.calling = self.made[name], name
            engine.clock = max(engine.clock, self.now)
            answers[name] = getattr(engine, method)(*own)
        self.now = max([self.now, *(self.made[name].clock for name in arguments)])
        return answers, {}


class VirtualClockwork(Clockwork):
    """Slices by the clock, which is the fleet's."""

    def __init__(self, config: RolloutConfig, fleet: TimedFleet) -> None:
        super().__init__(config)
        self.fleet, self.learned = fleet, 0.0

    def slice_beside(self, is_learned: bool) -> Slice | None:
        return Slice(None, SLICE_S) if self.fleet.now < self.learned else None


class Prompts:
    """A cursor over prompts of three tokens."""

    taken = 0

    def next(self, count: int) -> list[Prompt]:
        self.taken += count
        return [Prompt(f"p{i}", (1, 2, i % 20), "") for i in range(self.taken - count, self.taken)]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


def judge(items):
    return [SimpleNamespace(reward=0.0, parts={}) for _ in items]


def real_run(engines: int, ahead: int, monkeypatch):
    """(when each step's publication was over, seconds that the learner waited, the rollouts of all steps)."""
    fleet = TimedFleet(engines, monkeypatch)
    config = RolloutConfig(
        engines=engines, steps_ahead=ahead, prompts_per_step=PROMPTS, group_size=GROUP,
        max_prompt_tokens=8, max_completion_tokens=LIMIT,
    )  # fmt: skip
    clockwork = VirtualClockwork(config, fleet)
    spec = SamplingSpec(n=GROUP, max_tokens=LIMIT, seed=3)
    rewards = SimpleNamespace(judge=judge)
    collector = Collector(config, STEPS, fleet, rewards, Prompts(), lambda step: spec, clockwork)
    ends, waited, rollouts = [], 0.0, []
    for step in range(1, STEPS + 1):
        before = fleet.now
        collector.sample(step)
        waited += fleet.now - before
        rollouts += collector.judged(step)
        clockwork.learned = fleet.now + LEARN_S
        with collector.beside_learner():
            pass
        collector.pause()
        fleet.now = max(fleet.now, clockwork.learned) + PUBLISH_S
        ends.append(fleet.now)
        for engine in fleet.made.values():
            engine.policy_version = step * MINI_BATCHES
    return ends, waited, rollouts


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_models_steps_end_when_those_of_a_run_on_a_virtual_clock_do(engines, ahead, monkeypatch):
    ends, waited, rollouts = real_run(engines, ahead, monkeypatch)
    groups = [rollouts[i : i + GROUP] for i in range(0, len(rollouts), GROUP)]
    lengths = [[len(r.completion) for r in group] for group in groups]
    assert max(map(max, lengths)) > 4 * np.median(lengths)  # a tail, which some step waits for
    machine = Machine(
        engines=engines, places=1000, step_s=STEP_S, learn_s=LEARN_S, publish_s=PUBLISH_S, prompt_tokens=3,
        limit=LIMIT, slice_s=SLICE_S,
    )  # fmt: skip
    model = simulate(machine, lengths, PROMPTS, ahead)
    assert model.ends == tuple(ends)
    assert model.learner_idle == waited / ends[-1]
    step_of = {id(r): n // PROMPTS for n, group in enumerate(groups) for r in group}
    ages = [step_of[id(r)] - r.completion.policy_versions[0] // MINI_BATCHES for r in rollouts]
    assert (model.staleness_mean, model.staleness_max) == (sum(ages) / len(ages), max(ages))
    assert max(ages) == ahead
    versions = [len(np.unique(r.completion.policy_versions)) for r in rollouts]
    assert model.versions == sum(versions) / len(versions)
    if ahead:
        assert max(versions) > 1  # completions went on over a publication
