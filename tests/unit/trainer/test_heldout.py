"""Held-out evaluation inside a run: when, with what, and what it remembers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gspo_dist.config import EvaluationConfig
from gspo_dist.rewards.reward import Judged, RewardError
from gspo_dist.trainer.heldout import EVALUATION_IDS, evaluate, evaluation_due
from gspo_dist.types import SamplingSpec
from tests.unit.trainer.small import rollout


def run_of(*, steps: int = 10, every: int = 4, heldout: int = 3, reward=lambda prompt: 1.0):
    asked = []

    def generate(prompts, spec, request_ids):
        asked.append((spec, list(request_ids)))
        return [[rollout(0).completion for _ in range(spec.n)] for _ in prompts]

    return SimpleNamespace(
        config=SimpleNamespace(
            steps=steps,
            seed=5,
            evaluation=EvaluationConfig(every=every, samples=2, temperature=0.5, top_p=0.9),
        ),
        heldout=[rollout(i).prompt for i in range(heldout)],
        pool=SimpleNamespace(generate=generate),
        collector=SimpleNamespace(
            episodes=None, judge=lambda items: [Judged(reward(p), {}) for _, p, _ in items]
        ),
        sampling=SamplingSpec(n=8, max_tokens=16, temperature=1.0, seed=5, record_routing=True, candidates=8),
        first_evaluation={},
        last_evaluation={},
        asked=asked,
    )


@pytest.mark.parametrize(("every", "due"), [(4, [4, 8, 10]), (0, [10]), (5, [5, 10])])
def test_evaluations_are_due_on_the_schedule_and_at_the_end(every, due):
    assert [s for s in range(1, 11) if evaluation_due(run_of(every=every), s)] == due
    assert not evaluation_due(run_of(heldout=0), 10)


def test_it_samples_by_its_own_settings_and_draws_that_training_never_makes():
    run = run_of()
    evaluate(run)
    ((spec, ids),) = run.asked
    assert (spec.n, spec.temperature, spec.top_p, spec.seed) == (2, 0.5, 0.9, 6)
    assert spec.max_tokens == 16
    assert (spec.record_routing, spec.candidates) == (False, 0)
    assert ids == [EVALUATION_IDS, EVALUATION_IDS + 1, EVALUATION_IDS + 2]
    assert EVALUATION_IDS > 10**12  # groups of a run


def test_prompts_of_an_environment_are_played_beside_the_episodes_of_training(monkeypatch):
    """The engines play them with the tools of the run, and no answer is sampled without its turns."""
    played = []

    def play(pool, episodes, prompts, spec, ids):
        played.append((pool, episodes, prompts, spec.n, list(ids)))
        return [[rollout(0).completion for _ in range(spec.n)] for _ in prompts]

    monkeypatch.setattr("gspo_dist.trainer.heldout.play", play)
    run = run_of(heldout=2)
    run.collector.episodes = SimpleNamespace(beside=lambda: "episodes beside training")
    assert evaluate(run)["eval/heldout/accuracy"] == 1.0
    ids = [EVALUATION_IDS, EVALUATION_IDS + 1]
    assert played == [(run.pool, "episodes beside training", run.heldout, 2, ids)]
    assert run.asked == []


def test_accuracy_by_hand_and_the_first_and_newest_are_remembered():
    right = {"p0"}
    run = run_of(reward=lambda prompt: float(prompt.prompt_id in right))
    first = evaluate(run)
    assert first["eval/heldout/accuracy"] == pytest.approx(1 / 3, rel=1e-12)
    assert 0.0 <= first["time/evaluation_s"] < 60.0
    right |= {"p1"}
    second = evaluate(run)
    assert second["eval/heldout/accuracy"] == pytest.approx(2 / 3, rel=1e-12)
    assert run.first_evaluation == first
    assert run.last_evaluation == second


def test_what_a_reward_raises_ends_the_evaluation_and_is_not_remembered():
    def broken(prompt):
        raise RewardError("reward of prompt p0 raised KeyError")

    run = run_of(reward=broken)
    with pytest.raises(RewardError, match="reward of prompt p0"):
        evaluate(run)
    assert run.last_evaluation == {}
