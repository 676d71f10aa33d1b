"""A run with a user's own objective."""

from __future__ import annotations

import pytest

from gspo_dist.trainer.setup.factories import make_objective
from tests.unit.trainer.small import config, go

OWN = """
import torch
from gspo_dist.objectives import Objective, ObjectiveSpec, Surrogate

def plain(logprobs, old_logprobs, advantages, segments):
    ratio = torch.exp(logprobs - old_logprobs)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(-ratio * advantages, ratio.detach(), never, never)

PLAIN = Objective(ObjectiveSpec("plain", "sequence_mean", "none"), plain)

def length(prompt, completion):
    return float(len(completion))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The overrides that choose the objective above."""
    file = tmp_path / "own_objective_for_test.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        "objective=custom",
        "objective.name=own_objective_for_test:PLAIN",
        f"reward.function='{file}:length'",
        "steps=1",
        "data.heldout=null",
    ]


@pytest.mark.slow
def test_it_brings_its_own_advantage_estimator(model, reward_file, tmp_path, own):
    """With "none" the advantages are the rewards, unless the config asks for another estimator."""
    _, (row,) = go(config(model, reward_file, tmp_path / "own", *own))
    assert row["advantage/mean"] == pytest.approx(row["rollout/reward_mean"], rel=1e-6)
    assert row["rollout/reward_mean"] > 0
    _, (row,) = go(config(model, reward_file, tmp_path / "asked", *own, "objective.advantage=group_mean"))
    assert row["advantage/mean"] == pytest.approx(0.0, abs=1e-7)


def test_a_group_of_one_has_no_baseline(model, reward_file, tmp_path, own):
    alone = [*own, "rollout.group_size=1"]
    assert make_objective(config(model, reward_file, tmp_path, *alone)).spec.advantage == "none"
    with pytest.raises(ValueError, match="group_size must be at least 2 for group_mean advantages"):
        config(model, reward_file, tmp_path, *alone, "objective.advantage=group_mean")


def test_its_estimator_is_held_to_the_group_size_too(model, reward_file, tmp_path, own):
    source = (tmp_path / "own_objective_for_test.py").read_text().replace('"none"', '"leave_one_out"')
    (tmp_path / "own_estimator_for_test.py").write_text(source)
    asked = [*own, "objective.name=own_estimator_for_test:PLAIN", "rollout.group_size=1"]
    with pytest.raises(ValueError, match="group_size must be at least 2 for leave_one_out advantages"):
        make_objective(config(model, reward_file, tmp_path, *asked))
