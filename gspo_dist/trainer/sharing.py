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

import time
from collections.abc import Callable

from gspo_dist.learners.group import LearnerGroup
from gspo_dist.rollout.pool import RolloutPool

VERBS = ("learner_sleep", "learner_wake", "engines_sleep", "engines_wake")
"""What a hand-over is made of."""


class SharedGpus:
    """Gives the GPUs to whoever needs them next. Without colocation every verb does nothing."""

    def __init__(
        self,
        learner: LearnerGroup,
        pool: RolloutPool,
        *,
        colocated: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Colocated parts come from their start with the engines asleep (setup/processes.py)."""
        self.learner, self.pool, self.colocated, self.clock = learner, pool, colocated, clock
        self.turn = "learner"
        self.seconds = dict.fromkeys(VERBS, 0.0)
        """Of the hand-overs since the last `take_metrics`."""

    def to_engines(self) -> None:
        """Engines may sample. The learner is in host memory."""
        if self.colocated and self.turn != "engines":
            self._timed("learner_sleep", self.learner.sleep)
            self._timed("engines_wake", self.pool.wake_up)
            self.turn = "engines"

    def to_publication(self) -> None:
        """Engines may be updated, and the learner may say log-probs."""
        if not self.colocated or self.turn == "publication":
            return
        if self.turn == "learner":
            self._timed("learner_sleep", lambda: self.learner.sleep(keep_weights=True))
        else:
            self._timed("engines_sleep", self.pool.sleep)
            self._timed("learner_wake", lambda: self.learner.wake_up(weights_only=True))
        self._timed("engines_wake", lambda: self.pool.wake_up(weights_only=True))
        self.turn = "publication"

    def to_learner(self) -> None:
        """The learner may do anything. Engines are asleep."""
        if not self.colocated or self.turn == "learner":
            return
        self.to_engines()  # an engine of which a part is asleep cannot be put to sleep
        self._timed("engines_sleep", self.pool.sleep)
        self._timed("learner_wake", self.learner.wake_up)
        self.turn = "learner"

    def take_metrics(self) -> dict[str, float]:
        """time/switch* of all hand-overs since the last call. Empty without colocation."""
        if not self.colocated:
            return {}
        taken, self.seconds = self.seconds, dict.fromkeys(VERBS, 0.0)
        parts = {f"time/switch/{verb}_s": seconds for verb, seconds in taken.items()}
        return parts | {"time/switch_s": sum(taken.values())}

    def _timed(self, verb: str, hand_over: Callable[[], object]) -> None:
        start = self.clock()
        hand_over()
        self.seconds[verb] += self.clock() - start
