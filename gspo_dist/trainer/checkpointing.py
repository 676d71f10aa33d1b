"""Saving a run's state after a step, and continuing from it."""

from __future__ import annotations

import logging
import shutil

from gspo_dist.checkpoint import Checkpoint
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.learners.learner import OptimStep
from gspo_dist.metrics.sinks import going_on_without
from gspo_dist.trainer import export_probe
from gspo_dist.trainer.rollout_files import load_rollouts, save_rollouts
from gspo_dist.trainer.run import Run, UnfinishedSave

log = logging.getLogger(__name__)


def checkpoint_due(run: Run, step: int) -> bool:
    """Whether the state after `step` is saved: on the schedule, and at the end if `checkpoint.save_last`."""
    config = run.config.checkpoint
    if step == run.config.steps:
        return config.save_last
    return bool(config.every and step % config.every == 0)


def save(run: Run, step: int) -> None:
    """Saves the state after `step`. An asynchronous save becomes real in a later `commit`; the last
    one waits here.
    """
    commit(run)
    with going_on_without("the flips measured so far (flips_*.npz)"):
        run.flips.save(run.run_dir)
    run.shared.to_learner()
    folder = run.store.begin(step)
    with run.store.saving(folder):
        run.learner.save(folder / "learner")
        rollouts = save_rollouts(run.collector.buffer, folder, run.collector.episodes)
    state = {
        "policy_version": run.learner.policy_version,
        "cursor": run.collector.saved_cursor(),
        "rollouts": rollouts,
        "guard": run.guard.state_dict(),
        "tokens_seen": run.tokens_seen,
        "seconds": run.seconds,
        "published": run.publisher.published,
        "probe_means": run.publisher.tolerance.means,
        "first_evaluation": run.first_evaluation,
        "last_evaluation": run.last_evaluation,
    }
    with going_on_without("the log-probs that an export is held against"):
        state["export_probe"] = export_probe.take(run.learner, run.config, ensure_model(run.config.model))
    run.unfinished_save = UnfinishedSave(folder, step, state)
    if not run.config.learner.saves_asynchronously or step == run.config.steps:
        commit(run)


def save_hf(run: Run, step: int) -> None:
    """Writes the weights after `step` as an HF folder where `checkpoint.hf_every` asks for it.

    It is read back and compared before it appears. Then transformers must give the learner's log-probs over
    it, where the host has room for the model (`export_probe`). The oldest beyond `checkpoint.keep_hf` are
    removed. Raises ValueError on a full disk, and WeightSyncError for a folder that is another model.
    """
    every, keep = run.config.checkpoint.hf_every, run.config.checkpoint.keep_hf
    if not every or (step % every and step != run.config.steps):
        return
    root = run.run_dir.resolve() / "hf"
    root.mkdir(exist_ok=True)
    target = root / f"step-{step:06d}"
    # A resumed run may come to a step again.
    shutil.rmtree(target, ignore_errors=True)
    model = ensure_model(run.config.model)
    run.shared.to_publication()
    run.learner.export(model, target)
    if export_probe.has_room(target):
        export_probe.compare(export_probe.take(run.learner, run.config, model), run.config, target)
    else:
        log.warning("log-probs of %s are not compared: the model needs over half of the free memory", target)
    folders = (path for path in root.glob("step-*") if path.name[5:].isdigit())
    for old in sorted(folders, key=lambda path: int(path.name[5:]))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def save_again(run: Run, step: int) -> None:
    """Saves the state after `step` off the schedule, with the rollouts that were made since.

    Before the first step there is nothing that a new start would not have.
    """
    if step:
        save(run, step)
        commit(run)


def commit(run: Run) -> None:
    """Makes the unfinished checkpoint real, once every rank has written its part; does nothing without one.

    The loop calls it a step after an asynchronous save, so that the step hides the writing.
    """
    if run.unfinished_save is None:
        return
    unfinished = run.unfinished_save
    with run.store.saving(unfinished.folder):
        run.learner.wait_saved()
    run.last_checkpoint = run.store.commit(unfinished.folder, unfinished.step, unfinished.state)
    run.unfinished_save = None


def count_skips(run: Run, optim: OptimStep) -> None:
    """Counts optimiser steps that were skipped in a row.

    Raises FloatingPointError beyond `learner.max_skipped_steps`. A checkpoint that is still being written is
    finished first.
    """
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if optim.skipped else 0
    most = run.config.learner.max_skipped_steps
    if run.skipped_in_a_row <= most:
        return
    commit(run)
    raise FloatingPointError(
        f"learner.max_skipped_steps allows {most} optimiser steps in a row without a finite gradient: got "
        f"{run.skipped_in_a_row}, the last with norm {optim.grad_norm}; lower learner.optimizer.lr "
        "or look at the rollouts of this step, and resume"
    )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Continues from `checkpoint`: every part takes up what `save` kept of it.

    Whatever is raised, its notes say which checkpoint a run could go on from instead.
    """
    try:
        _restore(run, checkpoint)
    except Exception as error:
        where = f"checkpoint {checkpoint.folder} was not taken up"
        error.add_note(f"{where}: {run.store.way_around(checkpoint.folder)}")
        raise


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    run.learner.load(checkpoint.learner, state["policy_version"])
    accepted = run.config.checkpoint.accept
    run.collector.continue_from(
        checkpoint.step,
        state["cursor"],
        accept_other_prompts="data" in accepted or "data.train" in accepted,
    )
    load_rollouts(run.collector, checkpoint.folder, state.get("rollouts", {}))
    run.guard.load_state_dict(state["guard"])
    run.tokens_seen = state["tokens_seen"]
    run.seconds_before = state["seconds"]
    # The first publication of a resumed run repeats the last one.
    run.publisher.published = state["published"] - 1
    run.publisher.tolerance.means = list(state.get("probe_means", ()))
    run.first_evaluation = dict(state["first_evaluation"])
    run.last_evaluation = dict(state["last_evaluation"])
    with going_on_without("the flips measured before (flips_*.npz)"):
        run.flips.restore(run.run_dir, checkpoint.step)
    run.completed_steps = checkpoint.step
    run.last_checkpoint = checkpoint.folder


def what_is_saved(run: Run) -> str:
    """What of this run is safe on disk, for an error message."""
    if run.last_checkpoint is None:
        return f"no checkpoint was saved yet (checkpoint.every = {run.config.checkpoint.every})"
    return f"saved: {run.last_checkpoint}"
