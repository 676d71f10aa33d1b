"""A query set that is renewed: prompts leave when they are solved, and new ones come in by rate.

    waiting ──arrivals──► in play ──solve rate at least retire_at──► retired

The cursor hands out what is in play, pass after pass. What a step found out about its prompts is noted when
the step is handed out to be trained, and changes only what is drawn after that. So the prompts of a step
depend on the seed and on the rewards of the steps before, not on how fast anything was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gspo_dist.config import RenewalConfig
from gspo_dist.data.cursor import place, resumed_place
from gspo_dist.data.prompts import PromptSource
from gspo_dist.types import Prompt, Rollout

WAITING_STREAM = 0x3A17
"""Keeps the draw of who is in play apart from the orders of the passes."""


class RenewedCursor:
    """A place in an endless sequence of passes over the prompts in play."""

    def __init__(
        self, source: PromptSource, config: RenewalConfig, *, seed: int, shuffle: bool = True
    ) -> None:
        """Raises ValueError where more prompts shall be in play than there are."""
        count = len(source)
        active = count if config.active is None else config.active
        if active > count:
            raise ValueError(
                "data.renewal.active must be at most the number of training prompts: got "
                f"{active} and {count}"
            )
        self._source, self._config, self._seed, self._shuffle = source, config, seed, shuffle
        self._index = {prompt.prompt_id: i for i, prompt in enumerate(source)}
        if len(self._index) != count:
            raise ValueError(
                f"data.renewal keeps a solve rate for every prompt, by its id: got {count} prompts with "
                f"{len(self._index)} ids"
            )
        queue = np.random.default_rng([seed, WAITING_STREAM]).permutation(count) if shuffle else range(count)
        self._queue = [int(i) for i in queue]
        """Every prompt, in the order in which they come into play."""
        self._came = active
        """How many of the queue have come into play."""
        self._owed = 0.0
        """Arrivals that are due, the fraction of one included."""
        self._retired: set[int] = set()
        self._seen: dict[int, tuple[int, int, int]] = {}
        """Prompt -> (visits, completions, solved completions)."""
        self.epoch = self.position = 0
        self._order = self._order_of_pass()

    # --- handing out ---

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. One comes again only in a later pass. Raises ValueError when none is left."""
        return self.prompts(self.draw(n))

    def draw(self, n: int) -> list[int]:
        """The places in the source of the next `n` prompts."""
        drawn: list[int] = []
        while len(drawn) < n:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of_pass()
            index = self._order[self.position]
            self.position += 1
            if index not in self._retired:
                drawn.append(index)
        return drawn

    @property
    def size(self) -> int:
        """Prompts of the source."""
        return len(self._source)

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts at these places of the source."""
        return [self._source[i] for i in indices]

    def _order_of_pass(self) -> list[int]:
        playing = [i for i in self._queue[: self._came] if i not in self._retired]
        if not playing:
            raise ValueError(
                f"data.renewal has retired all {len(self._retired)} prompts that came into play, and none "
                "waits: raise data.renewal.retire_at, give more prompts, or end the run here"
            )
        if self._shuffle:
            rng = np.random.default_rng([self._seed, self.epoch])
            playing = [playing[i] for i in rng.permutation(len(playing))]
        wanted = self._config.curriculum
        if wanted is not None:
            # The sort is stable: equal distances keep the seed's order. -1 puts what is new before all.
            playing.sort(key=lambda i: abs(self._rate(i) - wanted) if i in self._seen else -1.0)
        return playing

    def _rate(self, index: int) -> float:
        _, completions, solved = self._seen[index]
        return solved / completions

    # --- renewing ---

    def note(self, rollouts: Sequence[Rollout]) -> None:
        """Takes in the judged rollouts of one step: solve rates, retirements, arrivals."""
        config, visited = self._config, dict[int, list[bool]]()
        for rollout in rollouts:
            index = self._index[rollout.prompt.prompt_id]
            visited.setdefault(index, []).append(rollout.reward >= config.solved_at)
        left = 0
        for index, solved in visited.items():
            visits, completions, right = self._seen.get(index, (0, 0, 0))
            self._seen[index] = (visits + 1, completions + len(solved), right + sum(solved))
            if config.retire_at is None or index in self._retired or visits + 1 < config.retire_after:
                continue
            if self._rate(index) >= config.retire_at:
                self._retired.add(index)
                left += 1
        self._owed += config.arrivals + (left if config.replace_retired else 0)
        new = min(int(self._owed), len(self._queue) - self._came)
        self._owed -= int(self._owed)
        # They open no pass of their own: the pass under way ends with them.
        self._order += self._queue[self._came : self._came + new]
        self._came += new

    def metrics(self) -> dict[str, float]:
        """data/*: prompts in play, waiting and gone, and the mean solve rate of those in play."""
        playing = [i for i in self._queue[: self._came] if i not in self._retired]
        rates = [self._rate(i) for i in playing if i in self._seen]
        return {
            "data/in_play": float(len(playing)),
            "data/waiting": float(len(self._queue) - self._came),
            "data/retired": float(len(self._retired)),
            "data/solve_rate": float(np.mean(rates)) if rates else float("nan"),
        }

    # --- the checkpoint ---

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on: plain values, fit for JSON."""
        return {
            "renewal": True,
            **place(self.epoch, self.position, self._seed, self._shuffle, self._source),
            "order": list(self._order),
            "came": self._came,
            "owed": self._owed,
            "retired": sorted(self._retired),
            "seen": [[index, *numbers] for index, numbers in sorted(self._seen.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, accept_other_prompts: bool = False) -> None:
        """Goes to a saved place.

        The query set is a history of these very prompts. So another number of them is refused whatever is
        accepted, and so is a checkpoint of a run whose set was not renewed. The rest is as `resumed_place`
        has it: another seed or shuffling is refused, and edited prompts are said.
        """
        now = self.state_dict()
        if state.get("renewal") and state["prompts"] != now["prompts"]:
            raise ValueError(
                f"data.renewal: prompts must be what the checkpoint was made with: got {now['prompts']}, it "
                f"has {state['prompts']}; restore them, or start a new run_dir"
            )
        self.epoch, self.position = resumed_place(state, now, accept_other_prompts=False)
        self._order = [int(i) for i in state["order"]]
        self._came, self._owed = int(state["came"]), float(state["owed"])
        self._retired = {int(i) for i in state["retired"]}
        self._seen = {int(row[0]): (int(row[1]), int(row[2]), int(row[3])) for row in state["seen"]}
