"""The steps of a run in which learner ranks are recorded (config/profile.py)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from gspo_dist.config import ProfileConfig
from gspo_dist.learners.group import LearnerGroup
from gspo_dist.metrics.sinks import going_on_without

log = logging.getLogger(__name__)

FOLDER = "profile"
"""Below the run's folder."""


class ProfileWindow:
    """`with window(step):` around the learner's part of a step: the update and the publication."""

    def __init__(self, config: ProfileConfig, learner: LearnerGroup, run_dir: Path) -> None:
        self.config, self.learner = config, learner
        self.folder = run_dir / FOLDER
        self.said: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Records where `step` is one of those that were asked for. What goes wrong is said once.

        A step that fails leaves no trace: its learner may be dead or stuck, and whoever asks it would wait.
        """
        if step not in self.config.steps:
            yield
            return
        ranks = tuple(sorted(set(self.config.ranks)))
        with going_on_without(FOLDER, self.said):
            self.learner.start_profile(ranks)
        yield
        with going_on_without(FOLDER, self.said):
            files = self.learner.stop_profile(ranks, self.folder / f"step-{step:06d}")
            log.info("profile of step %d: %s", step, ", ".join(map(str, files)))
