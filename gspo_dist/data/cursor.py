"""Hands out prompts in shuffled epochs. A run can stop anywhere and go on with the very next prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gspo_dist.data.prompts import PromptSource
from gspo_dist.types import Prompt

log = logging.getLogger(__name__)


class PromptCursor:
    """A place in an endless sequence of epochs over `source`.

    Epoch e visits every prompt once, in an order that depends on (seed, e) alone, so that the whole state
    is two numbers. A batch that an epoch cannot fill takes the rest from the next epoch.
    """

    def __init__(self, source: PromptSource, *, seed: int, shuffle: bool = True) -> None:
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = source.fingerprint
        self.epoch = 0
        self.position = 0
        self._order = self._order_of(0)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; a prompt comes again only when its epoch is over."""
        return self.prompts(self.draw(n))

    @property
    def size(self) -> int:
        """Prompts of the source."""
        return len(self._source)

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts at these places of the source."""
        return [self._source[i] for i in indices]

    def draw(self, n: int) -> list[int]:
        """The places in the source of the next `n` prompts."""
        if n < 1:
            raise ValueError(f"a batch must hold at least one prompt: got {n}")
        batch: list[int] = []
        while len(batch) < n:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            taken = self._order[self.position : self.position + n - len(batch)]
            batch += [int(i) for i in taken]
            self.position += len(taken)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place, and what must be equal for it to mean the same: plain values, fit for JSON."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "prompts": len(self._source),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, accept_other_prompts: bool = False) -> None:
        """Goes to a saved place.

        Prompts that were edited in place (a repaired record) keep their order, so the run goes on with a
        warning. Another number of prompts has another order: that raises ValueError, as another seed or
        shuffling does, unless `accept_other_prompts` says to begin a new epoch with them.
        """
        for name, now in (("seed", self._seed), ("shuffle", self._shuffle), ("renewal", None)):
            if state.get(name) != now:
                raise ValueError(
                    f"data cursor: {name} must be what the checkpoint was made with: got {now!r}, it has "
                    f"{state.get(name)!r}; restore it, or start a new run_dir"
                )
        epoch, position, count = int(state["epoch"]), int(state["position"]), len(self._source)
        if state["prompts"] != count:
            if not accept_other_prompts:
                raise ValueError(
                    f"data.train must have the prompts that the checkpoint was made with: got {count}, it "
                    f"has {state['prompts']}; restore them, start a new run_dir, or begin a new epoch with "
                    "these: 'checkpoint.accept=[data.train]'"
                )
            epoch, position = epoch + 1, 0
            log.warning(
                "data.train has %d prompts instead of %d: a new epoch begins", count, state["prompts"]
            )
        elif state["fingerprint"] != self._fingerprint:
            log.warning("prompts of data.train were edited since the checkpoint: their order stays")
        if epoch < 0 or not 0 <= position <= count:
            raise ValueError(f"data cursor: no such place: epoch {epoch}, position {position} of {count}")
        self.epoch, self.position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._source))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
