"""Who has the memory of the GPUs that learner and engines share (`cluster.colocated`).

    turn           on the GPUs                              for
    engines        the engines                              sampling, evaluation, their log-probs
    publication    both sides' weights                      the weight sync, exports, the learner's log-probs
    learner        the learner                              log-probs, updates, checkpoints

Each turn frees before it takes, so that no moment needs more than the turns themselves. What is not on a GPU
is in its host's memory. Engines hand over without work in the making: the caller pauses the collector before.
The successor of an engine that died starts in the engines' turn, and the turn ends when it is up.
"""

from __future__ import annotations

from gspo_dist.learners.group import LearnerGroup
from gspo_dist.rollout.pool import RolloutPool


class SharedGpus:
    """Gives the GPUs to whoever needs them next. Without colocation every verb does nothing."""

    def __init__(self, learner: LearnerGroup, pool: RolloutPool, *, colocated: bool) -> None:
        """Colocated parts come from their start with the engines asleep (setup/processes.py)."""
        self.learner, self.pool, self.colocated = learner, pool, colocated
        self.turn = "learner"

    def to_engines(self) -> None:
        """Engines may sample. The learner is in host memory."""
        if self.colocated and self.turn != "engines":
            self.learner.sleep()
            self.pool.wake_up()
            self.turn = "engines"

    def to_publication(self) -> None:
        """Engines may be updated, and the learner may say log-probs."""
        if not self.colocated or self.turn == "publication":
            return
        if self.turn == "learner":
            self.learner.sleep(keep_weights=True)
        else:
            self.pool.sleep()
            self.learner.wake_up(weights_only=True)
        self.pool.wake_up(weights_only=True)
        self.turn = "publication"

    def to_learner(self) -> None:
        """The learner may do anything. Engines are asleep."""
        if not self.colocated or self.turn == "learner":
            return
        self.to_engines()  # an engine of which a part is asleep cannot be put to sleep
        self.pool.sleep()
        self.learner.wake_up()
        self.turn = "learner"
