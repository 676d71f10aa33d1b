"""A run that begins again by itself from its newest checkpoint, when a process that it needs has died.

A dead engine or reward worker never comes to this: its work goes to the others (rollout/fleet.py). A dead
learner rank takes the weights of its group with it. Everything is ended and built again then, since the other
ranks may wait in a collective.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from gspo_dist.config import RunConfig
from gspo_dist.failures import Event, ProcessDied, ProcessTimeout, first_line
from gspo_dist.trainer.loop import train
from gspo_dist.trainer.run import Run
from gspo_dist.trainer.setup.build import build

log = logging.getLogger(__name__)


def train_run(config: RunConfig) -> tuple[Path, dict[str, object]]:
    """Builds and trains; returns the run's folder and its summary.

    Goes on from the newest checkpoint at most `checkpoint.restarts` times without a new one in between. The
    rollouts that it holds, finished or not, are used. A process that dies while the run comes up again counts
    as one more. Raises what ends a run otherwise.
    """
    died: list[Event] = []
    told = 0
    saved: Path | None = None
    while True:
        run: Run | None = None
        try:
            run = build(config)
            run.health.note(run.completed_steps, died[told:])
            told = len(died)
            return run.run_dir, train(run)
        except (ProcessDied, ProcessTimeout) as error:
            if run is None and not died:
                raise  # what does not come up the first time would not come up the second
            if run is not None and run.last_checkpoint != saved:
                died, told, saved = [], 0, run.last_checkpoint
            if len(died) >= config.checkpoint.restarts:
                error.add_note(
                    f"after {len(died)} restarts without a new checkpoint (checkpoint.restarts = "
                    f"{config.checkpoint.restarts})"
                )
                raise
            where = saved.name if saved else "the beginning, nothing was saved yet"
            died.append(Event("restart", "run", f"from {where}: {first_line(error)}"))
            notes = getattr(error, "__notes__", [])  # such as which rank was stuck
            log.warning("the run begins again from %s: %s", where, "\n".join([str(error), *notes]))
            if run is not None:
                run.sinks.abandon()
            # What the failed attempt has saved is this run's own, whatever the first start was told.
            config = replace(config, checkpoint=replace(config.checkpoint, resume=True))
        finally:
            if run is not None:
                run.release()
