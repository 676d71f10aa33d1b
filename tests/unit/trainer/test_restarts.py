"""A run whose learner dies goes on by itself: how often, from where, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gspo_dist.config import CheckpointConfig, RunConfig
from gspo_dist.failures import CollectiveTimeout, ProcessDied, ProcessTimeout
from gspo_dist.rollout.pool import NoEngineLeft
from gspo_dist.trainer import restarts
from gspo_dist.trainer.restarts import train_run


class Attempts:
    """A build and a train that end as told: an error with the newest checkpoint, or a summary."""

    def __init__(self, monkeypatch, *ends):
        self.ends, self.configs, self.released, self.noted = list(ends), [], 0, []
        monkeypatch.setattr(restarts, "build", self.build)
        monkeypatch.setattr(restarts, "train", self.train)

    def build(self, config):
        self.configs.append(config)
        if self.ends and isinstance(self.ends[0], Exception):
            raise self.ends.pop(0)
        run = SimpleNamespace(run_dir=Path("run"), completed_steps=4, last_checkpoint=None)
        run.health = SimpleNamespace(note=lambda step, events: self.noted.extend((step, *e) for e in events))
        run.release = self.release
        run.sinks = SimpleNamespace(abandon=lambda: self.noted.append("abandoned"))
        return run

    def release(self):
        self.released += 1

    def train(self, run):
        end = self.ends.pop(0)
        if isinstance(end, dict):
            return end
        error, checkpoint = end
        run.last_checkpoint = checkpoint
        raise error


SAVED = Path("checkpoints/step-000004")


def config(count, resume=False):
    return RunConfig(checkpoint=CheckpointConfig(restarts=count, resume=resume))


def test_a_stuck_rank_is_named_where_the_run_begins_again(monkeypatch, caplog):
    error = CollectiveTimeout("learner-0 waited 600 s in gloo:all_reduce")
    error.add_note("learner-1 has not answered at all")
    Attempts(monkeypatch, (error, SAVED), {"steps": 9})
    assert train_run(config(1)) == (Path("run"), {"steps": 9})
    assert (
        "again from step-000004: learner-0 waited 600 s in gloo:all_reduce\nlearner-1 has not" in caplog.text
    )


def test_a_dead_or_silent_learner_is_started_again_from_the_newest_checkpoint(monkeypatch):
    attempts = Attempts(
        monkeypatch,
        (ProcessDied("learner-1 died: killed\nlast lines"), None),
        (ProcessTimeout("no answer within 60 s from learner-0"), SAVED),
        {"steps": 9},
    )
    assert train_run(config(2)) == (Path("run"), {"steps": 9})
    assert [c.checkpoint.resume for c in attempts.configs] == [False, True, True]
    assert attempts.released == 3
    assert attempts.noted == [
        "abandoned",
        (4, "restart", "run", "from the beginning, nothing was saved yet: learner-1 died: killed"),
        "abandoned",
        (4, "restart", "run", "from step-000004: no answer within 60 s from learner-0"),
    ]


def test_so_many_restarts_without_a_new_checkpoint_are_enough(monkeypatch):
    dies = (ProcessDied("learner-0 died"), SAVED)
    attempts = Attempts(monkeypatch, dies, dies, dies, dies)
    with pytest.raises(ProcessDied, match="learner-0 died") as caught:
        train_run(config(2))
    assert caught.value.__notes__ == ["after 2 restarts without a new checkpoint (checkpoint.restarts = 2)"]
    assert (len(attempts.configs), attempts.released) == (3, 3)


def test_a_process_that_dies_while_the_run_comes_up_again_is_one_more_restart(monkeypatch):
    """Each is noted by the attempt that comes up; what fails in the very first start ends the command."""
    attempts = Attempts(
        monkeypatch, (ProcessDied("learner-1 died"), SAVED), ProcessDied("learner-0 died"), {"steps": 9}
    )
    assert train_run(config(2)) == (Path("run"), {"steps": 9})
    assert attempts.released == 2
    assert attempts.noted == [
        "abandoned",
        (4, "restart", "run", "from step-000004: learner-1 died"),
        (4, "restart", "run", "from step-000004: learner-0 died"),
    ]
    attempts = Attempts(monkeypatch, (ProcessDied("learner-1 died"), SAVED), ProcessDied("learner-0 died"))
    with pytest.raises(ProcessDied, match="learner-0 died") as caught:
        train_run(config(1))
    assert caught.value.__notes__ == ["after 1 restarts without a new checkpoint (checkpoint.restarts = 1)"]
    attempts = Attempts(monkeypatch, ProcessDied("learner-0 died"), {})
    with pytest.raises(ProcessDied, match="learner-0 died"):
        train_run(config(3))
    assert (len(attempts.configs), attempts.released) == (1, 0)


def test_a_new_checkpoint_begins_the_count_again(monkeypatch):
    ends = [(ProcessDied("learner-0 died"), Path(f"step-{i}")) for i in range(5)]
    attempts = Attempts(monkeypatch, *ends, {})
    train_run(config(1))
    assert len(attempts.configs) == 6


@pytest.mark.parametrize("error", [ValueError("bad"), FloatingPointError("nan"), NoEngineLeft("none")])
def test_other_ends_are_ends(monkeypatch, error):
    attempts = Attempts(monkeypatch, (error, SAVED))
    with pytest.raises(type(error)):
        train_run(config(3))
    assert (len(attempts.configs), attempts.released) == (1, 1)
