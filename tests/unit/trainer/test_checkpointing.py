"""What a checkpoint keeps, when it becomes real, and what a restored run continues from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.config import CheckpointConfig, FlipsConfig, GuardConfig, ObjectiveConfig, RolloutConfig
from gspo_dist.learners.learner import OptimStep
from gspo_dist.objectives.objective import get_objective
from gspo_dist.trainer import checkpointing, export_probe
from gspo_dist.trainer.checkpointing import (
    checkpoint_due,
    commit,
    count_skips,
    restore,
    save,
    save_again,
    save_hf,
    what_is_saved,
)
from gspo_dist.trainer.clockwork import Clockwork
from gspo_dist.trainer.flip_meter import FlipMeter
from gspo_dist.trainer.guard import OffsetGuard
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.weights.tolerance import ProbeTolerance
from tests.unit.trainer.small import BookLearner
from tests.unit.trainer.test_guard import measured


class Cursor:
    def __init__(self) -> None:
        self.place, self.accepted = 0, None

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state, *, accept_other_prompts):
        self.place, self.accepted = state["place"], accept_other_prompts


def run_of(folder, *, steps: int = 10, asynchronous: bool = False, **checkpoint):
    learner = BookLearner()
    objective = ObjectiveConfig(name="gspo", guard=GuardConfig(action="recentre", estimator="ema"))
    config = SimpleNamespace(
        steps=steps,
        checkpoint=CheckpointConfig(**checkpoint),
        learner=SimpleNamespace(saves_asynchronously=asynchronous, max_skipped_steps=1),
    )
    return SimpleNamespace(
        config=config,
        run_dir=folder,
        store=CheckpointStore(folder, config.checkpoint.keep),
        learner=learner,
        shared=SharedGpus(None, None, colocated=False),
        collector=Collector(
            RolloutConfig(), steps, None, None, Cursor(), lambda step: None, Clockwork(RolloutConfig())
        ),
        guard=OffsetGuard(objective, get_objective("gspo"), learner, 0, 64),
        flips=FlipMeter(FlipsConfig(every=0), learner, 0, 2, 1, 64),
        publisher=SimpleNamespace(published=1, tolerance=ProbeTolerance("fp32", None)),
        tokens_seen=0,
        seconds=0.0,
        seconds_before=0.0,
        first_evaluation={},
        last_evaluation={},
        skipped_in_a_row=0,
        unfinished_save=None,
        last_checkpoint=None,
        completed_steps=0,
    )


def test_a_restored_run_has_what_the_saved_one_had(tmp_path):
    run = run_of(tmp_path)
    run.learner.policy_version, run.tokens_seen, run.seconds = 12, 777, 61.5
    run.collector.trained_cursor = {"place": 5}
    run.publisher.published, run.publisher.tolerance.means = 4, [0.02, 0.03]
    run.first_evaluation, run.last_evaluation = {"eval/x": 0.25}, {"eval/x": 0.5}
    run.guard.observe(measured(-1.5e-3), 0)
    save(run, 3)
    again = run_of(tmp_path)
    restore(again, again.store.newest())
    assert again.learner.policy_version == 12
    assert again.learner.calls[-1] == (
        "load",
        {"folder": tmp_path / "checkpoints" / "step-000003" / "learner"},
    )
    assert (again.collector.cursor.place, again.tokens_seen, again.seconds_before) == (5, 777, 61.5)
    assert again.publisher.published == 3  # its first publication repeats the last one
    assert again.publisher.tolerance.own == 0.025
    assert (again.first_evaluation, again.last_evaluation) == ({"eval/x": 0.25}, {"eval/x": 0.5})
    assert again.guard.state_dict() == run.guard.state_dict()
    assert again.guard.decision.offset == pytest.approx(-1.5e-3, rel=1e-5)
    assert again.completed_steps == again.collector.buffer.begun == 3
    assert not (tmp_path / "checkpoints" / "step-000003" / "rollouts").exists()  # nothing was begun beyond
    assert again.last_checkpoint == tmp_path / "checkpoints" / "step-000003"


@pytest.mark.parametrize("older", [None, "whole", "torn"])
def test_a_checkpoint_that_cannot_be_taken_up_names_the_whole_one_before_it(tmp_path, monkeypatch, older):
    """Its sizes are right and its bytes are not, which only the learner that reads them can tell."""
    run = run_of(tmp_path, keep=4)
    for step in (2, 3, 5) if older else (5,):
        run.learner.policy_version = step
        save(run, step)
    if older == "torn":
        (tmp_path / "checkpoints/step-000003/manifest.json").write_text("{")

    def broken(folder, policy_version):
        raise RuntimeError("bad magic number")

    again = run_of(tmp_path)
    monkeypatch.setattr(again.learner, "load", broken)
    with pytest.raises(RuntimeError, match="bad magic") as caught:
        restore(again, again.store.newest())
    place = tmp_path / "checkpoints"
    before = {None: None, "whole": "step-000003", "torn": "step-000002"}[older]
    way_out = f"remove it to go on from {place / before}" if before else "start a new run_dir"
    assert caught.value.__notes__ == [f"checkpoint {place / 'step-000005'} was not taken up: {way_out}"]


def test_a_save_keeps_the_flip_rates_measured_so_far(tmp_path):
    run = run_of(tmp_path)
    run.flips = FlipMeter(FlipsConfig(every=1), run.learner, 0, 2, 1, 64)
    run.flips.history["update"].append(1, [0.25, 0.5])
    save(run, 1)
    again = run_of(tmp_path)
    again.flips = FlipMeter(FlipsConfig(every=1), again.learner, 0, 2, 1, 64)
    restore(again, again.store.newest())
    assert again.flips.history["update"].rates.tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize(
    ("accept", "told"), [([], False), (["data.train"], True), (["data"], True), (["reward"], False)]
)
def test_other_prompts_are_accepted_by_name(tmp_path, accept, told):
    save(run_of(tmp_path), 1)
    again = run_of(tmp_path, accept=accept)
    restore(again, again.store.newest())
    assert again.collector.cursor.accepted is told


def test_an_asynchronous_save_becomes_real_a_step_later_and_the_last_one_at_once(tmp_path):
    run = run_of(tmp_path, steps=2, asynchronous=True)
    save(run, 1)
    assert run.store.newest() is None
    assert run.last_checkpoint is None
    assert ("wait_saved", {}) not in run.learner.calls
    commit(run)
    assert run.store.newest().step == 1
    assert run.learner.calls[-1] == ("wait_saved", {})
    commit(run)  # nothing to do
    assert run.learner.calls.count(("wait_saved", {})) == 1
    save(run, 2)
    assert run.store.newest().step == 2


def test_a_save_that_was_not_committed_is_committed_by_the_next_one(tmp_path):
    run = run_of(tmp_path, asynchronous=True, keep=5)
    save(run, 1)
    save(run, 2)
    assert run.store.newest().step == 1
    commit(run)
    assert run.store.newest().step == 2


def test_an_asynchronous_manifest_is_of_the_moment_of_the_save(tmp_path):
    run = run_of(tmp_path, asynchronous=True)
    run.tokens_seen, run.learner.policy_version = 10, 2
    save(run, 1)
    run.tokens_seen, run.learner.policy_version = 20, 4
    commit(run)
    state = run.store.newest().state
    assert (state["tokens_seen"], state["policy_version"]) == (10, 2)


@pytest.mark.parametrize(
    ("every", "steps", "kept"),
    [(0, 4, []), (2, 4, [2, 4]), (1, 3, [2, 3]), (3, 4, [3, 4]), (5, 4, [4])],
)
def test_weights_alone_are_written_on_their_schedule_and_the_newest_kept(
    tmp_path, monkeypatch, caplog, every, steps, kept
):
    monkeypatch.setattr(checkpointing, "ensure_model", lambda model: tmp_path / "source")
    run = run_of(tmp_path, steps=steps, hf_every=every)
    run.config.model = None
    asked, compared = [], []
    monkeypatch.setattr(export_probe, "take", lambda learner, config, model: (learner, model))
    monkeypatch.setattr(export_probe, "compare", lambda *given: compared.append(given))
    monkeypatch.setattr(export_probe, "usable_memory", lambda: (100, 2))

    def export(source, target):
        asked.append((source, target))
        target.mkdir()  # as the real one, it asks for a folder that is not there
        # The file of the first step is too large for this host.
        (target / "model.safetensors").write_bytes(b"x" if asked[1:] else b"xy")

    run.learner.export = export
    for step in [*range(1, steps + 1), steps]:  # the last one again, as after a resume
        save_hf(run, step)
    assert [path.name for path in sorted(tmp_path.glob("hf/*"))] == [f"step-{n:06d}" for n in kept]
    assert all(source == tmp_path / "source" for source, _ in asked)
    source = (run.learner, tmp_path / "source")
    assert compared == [(source, run.config, target) for _, target in asked[1:]]
    left_out = [r.getMessage() for r in caplog.records if "are not compared" in r.getMessage()]
    assert [str(target) in said for (_, target), said in zip(asked, left_out, strict=False)] == [True] * len(
        asked[:1]
    )


def test_the_newest_folders_are_those_of_the_highest_steps(tmp_path, monkeypatch):
    """Also beyond six digits. What is no folder of a step stays, and one that cannot go stops nothing."""
    monkeypatch.setattr(checkpointing, "ensure_model", lambda model: tmp_path / "source")
    monkeypatch.setattr(export_probe, "has_room", lambda target: False)
    run = run_of(tmp_path, steps=1_000_000, hf_every=1, keep_hf=1)
    run.config.model = None
    run.learner.export = lambda source, target: target.mkdir()
    for name in ("step-000002", "step-x1", "step-999999"):
        (tmp_path / "hf" / name).mkdir(parents=True)
    (tmp_path / "hf" / "step-000003").symlink_to(tmp_path / "hf" / "step-000002")
    save_hf(run, 1_000_000)
    left = {path.name for path in (tmp_path / "hf").iterdir()}
    assert left == {"step-000003", "step-1000000", "step-x1"}


def test_a_state_off_the_schedule_is_real_at_once(tmp_path):
    run = run_of(tmp_path, asynchronous=True)
    save_again(run, 0)  # a new start has it too
    assert run.unfinished_save is None
    save_again(run, 3)
    assert run.store.newest().step == 3
    assert run.learner.calls[-1] == ("wait_saved", {})


def test_a_restored_run_takes_up_the_rollouts_of_its_checkpoint(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    monkeypatch.setattr(checkpointing, "save_rollouts", lambda buffer, folder, episodes: {"begun": 4})
    save(run, 3)
    taken = []
    monkeypatch.setattr(checkpointing, "load_rollouts", lambda *given: taken.append(given))
    again = run_of(tmp_path)
    restore(again, again.store.newest())
    assert taken == [(again.collector, tmp_path / "checkpoints" / "step-000003", {"begun": 4})]


def test_a_checkpoint_is_written_in_the_learners_turn_and_an_hf_folder_in_a_publications(
    tmp_path, monkeypatch
):
    """Where learner and engines share GPUs: a checkpoint has all states, a folder needs weights alone."""
    monkeypatch.setattr(checkpointing, "ensure_model", lambda model: tmp_path / "source")
    monkeypatch.setattr(export_probe, "has_room", lambda target: False)
    said: list[str] = []
    run = run_of(tmp_path, hf_every=1)
    run.config.model = None
    run.shared = SimpleNamespace(
        to_learner=lambda: said.append("learner"), to_publication=lambda: said.append("publication")
    )
    write = run.learner.save
    run.learner.save = lambda folder: (said.append("save"), write(folder))
    run.learner.export = lambda source, target: said.append("export")
    save(run, 1)
    save_hf(run, 1)
    assert said == ["learner", "save", "publication", "export"]


def test_a_checkpoint_keeps_log_probs_for_an_export_where_it_can(tmp_path, monkeypatch):
    run = run_of(tmp_path, keep=5)
    monkeypatch.setattr(checkpointing, "ensure_model", lambda model: tmp_path / "source")
    run.config.model = None
    asked = []
    monkeypatch.setattr(export_probe, "take", lambda *given: asked.append(given) or [[-1.5], [-2.25]])
    save(run, 1)
    assert asked == [(run.learner, run.config, tmp_path / "source")]
    assert run.store.newest().state["export_probe"] == [[-1.5], [-2.25]]

    def fails(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(export_probe, "take", fails)
    save(run, 2)
    assert run.store.newest().step == 2
    assert "export_probe" not in run.store.newest().state


def test_a_bound_on_skipped_steps_in_a_row_stops_and_keeps_the_save_that_was_under_way(tmp_path):
    run = run_of(tmp_path, asynchronous=True)
    save(run, 1)
    good, bad = OptimStep(1.0, 0.1, 4), OptimStep(float("inf"), 0.1, 4, skipped=True)
    for step in (bad, good, bad):
        count_skips(run, step)
    assert run.skipped_in_a_row == 1
    assert run.store.newest() is None
    with pytest.raises(
        FloatingPointError, match=r"max_skipped_steps allows 1 .* got 2, the last with norm inf"
    ):
        count_skips(run, bad)
    assert run.store.newest().step == 1


@pytest.mark.parametrize(
    ("every", "last", "due"),
    [(0, True, [6]), (0, False, []), (2, True, [2, 4, 6]), (4, False, [4]), (6, False, [])],
)
def test_checkpoints_are_due_on_the_schedule_and_at_the_end(tmp_path, every, last, due):
    run = run_of(tmp_path, steps=6, every=every, save_last=last)
    assert [step for step in range(1, 7) if checkpoint_due(run, step)] == due


def test_what_is_saved_is_said(tmp_path):
    run = run_of(tmp_path, every=5)
    assert what_is_saved(run) == "no checkpoint was saved yet (checkpoint.every = 5)"
    save(run, 5)
    assert what_is_saved(run) == f"saved: {tmp_path / 'checkpoints' / 'step-000005'}"
    manifest = json.loads((tmp_path / "checkpoints" / "step-000005" / "manifest.json").read_text())
    assert manifest["step"] == 5
