"""Hands out prompts in shuffled epochs. A run can stop anywhere and go on with the very next prompt."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

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
        return place(self.epoch, self.position, self._seed, self._shuffle, self._source)

    def load_state_dict(self, state: Mapping[str, Any], *, accept_other_prompts: bool = False) -> None:
        """Goes to a saved place.

        Prompts that were edited in place (a repaired record) keep their order, so the run goes on with a
        warning. Another number of prompts has another order: that raises ValueError, as another seed or
        shuffling does, unless `accept_other_prompts` says to begin a new epoch with them.
        """
        self.epoch, self.position = resumed_place(
            state, self.state_dict(), accept_other_prompts=accept_other_prompts
        )
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._source))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._source))


class Source(Protocol):
    """What a place in it means: how many prompts there are, and which."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal prompts in equal order."""
        ...


def place(epoch: int, position: int, seed: int, shuffle: bool, source: Source) -> dict[str, Any]:
    """The state of a cursor: the place, and what must be equal for it to mean the same."""
    return {
        "epoch": epoch,
        "position": position,
        "seed": seed,
        "shuffle": shuffle,
        "prompts": len(source),
        "fingerprint": source.fingerprint,
    }


def resumed_place(
    state: Mapping[str, Any], own: Mapping[str, Any], *, accept_other_prompts: bool
) -> tuple[int, int]:
    """(epoch, position) of a saved state, for a cursor whose own state is `own`.

    Raises ValueError for another seed, shuffling or number of prompts, and for a place that is none.
    """
    who = "data.renewal" if own.get("renewal") else "data cursor"
    for name in ("renewal", "seed", "shuffle"):
        if state.get(name) != own.get(name):
            raise ValueError(
                f"{who}: {name} must be what the checkpoint was made with: got {own.get(name)!r}, it "
                f"has {state.get(name)!r}; restore it, or start a new run_dir"
            )
    epoch, position, count = int(state["epoch"]), int(state["position"]), own["prompts"]
    if state["prompts"] != count:
        if not accept_other_prompts:
            raise ValueError(
                f"data.train must have the prompts that the checkpoint was made with: got {count}, it "
                f"has {state['prompts']}; restore them, start a new run_dir, or begin a new epoch with "
                "these: 'checkpoint.accept=[data.train]'"
            )
        epoch, position = epoch + 1, 0
        log.warning("data.train has %d prompts instead of %d: a new epoch begins", count, state["prompts"])
    elif state["fingerprint"] != own["fingerprint"]:
        log.warning("prompts of data.train were edited since the checkpoint: their order stays")
    if epoch < 0 or not 0 <= position <= count:
        raise ValueError(f"data cursor: no such place: epoch {epoch}, position {position} of {count}")
    return epoch, position


class Cursor(Protocol):
    """Hands out prompts without end, and can be taken up again at any place."""

    @property
    def size(self) -> int:
        """Places of the source."""
        ...

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        ...

    def draw(self, n: int) -> list[int]:
        """The places in the source of the next `n` prompts: `next`, as numbers that a checkpoint can keep."""
        ...

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts at these places."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place as plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], *, accept_other_prompts: bool = False) -> None:
        """Goes to a saved place. Raises ValueError where it means something else here."""
        ...


class MixedCursor:
    """Prompts of several sources in fixed shares, each source in its own order and its own epochs.

    The next prompt is of the source that is furthest behind its share. So after any number of prompts no
    source is more than one prompt away from its share, and small sources repeat while large ones go on.

    Example: weights 2 and 1 give a b a a b a a b a ...
    """

    def __init__(self, cursors: Mapping[str, Cursor], weights: Mapping[str, float]) -> None:
        self.cursors = dict(cursors)
        whole = sum(weights.values())
        self.shares = {name: weights[name] / whole for name in cursors}
        self.taken = dict.fromkeys(cursors, 0)
        sizes = itertools.accumulate((cursor.size for cursor in cursors.values()), initial=0)
        self._first = dict(zip(cursors, sizes, strict=False))
        """The place of each source's first prompt."""

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        return self.prompts(self.draw(n))

    @property
    def size(self) -> int:
        """Places of all sources, one source after the other."""
        return sum(cursor.size for cursor in self.cursors.values())

    def draw(self, n: int) -> list[int]:
        """The places of the next `n` prompts. Those of the second source follow the last of the first."""
        if n < 1:
            raise ValueError(f"a batch must hold at least one prompt: got {n}")
        drawn = []
        for name in (self._turn() for _ in range(n)):
            (index,) = self.cursors[name].draw(1)
            drawn.append(self._first[name] + index)
        return drawn

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts at these places."""
        firsts = list(self._first.values())
        owners = [bisect.bisect_right(firsts, index) - 1 for index in indices]
        found: dict[int, Iterator[Prompt]] = {}
        for owner, (name, first) in enumerate(self._first.items()):
            own = [index - first for index, whose in zip(indices, owners, strict=True) if whose == owner]
            found[owner] = iter(self.cursors[name].prompts(own))
        return [next(found[owner]) for owner in owners]

    def _turn(self) -> str:
        count = sum(self.taken.values()) + 1
        name = max(self.shares, key=lambda own: self.shares[own] * count - self.taken[own])
        self.taken[name] += 1
        return name

    def state_dict(self) -> dict[str, Any]:
        """The places of all sources, their shares, and how many prompts each gave."""
        places = {name: cursor.state_dict() for name, cursor in self.cursors.items()}
        return {"mixture": places, "shares": dict(self.shares), "taken": dict(self.taken)}

    def load_state_dict(self, state: Mapping[str, Any], *, accept_other_prompts: bool = False) -> None:
        """Goes to a saved place. Raises ValueError for other sources or shares; so do the cursors."""
        if state.get("shares") != self.shares:
            raise ValueError(
                "data.mixture must be what the checkpoint was made with: got the shares "
                f"{self.shares}, it has {state.get('shares')}; restore it, or start a new run_dir"
            )
        for name, cursor in self.cursors.items():
            cursor.load_state_dict(state["mixture"][name], accept_other_prompts=accept_other_prompts)
        self.taken = {name: int(count) for name, count in state["taken"].items()}
