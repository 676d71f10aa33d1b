"""Prompts of files too large to hold: rows are read when their turn comes, in an order that can be repeated.

    file ──► blocks of rows ──► window: some blocks, shuffled ──► rendered ──► handed out

An index is made first: where each block begins, and which rows repeat the question of an earlier one. It
takes 16 bytes per row while it is made. What is kept is a few numbers per block. An epoch visits the blocks
in an order drawn anew, and the rows of a window of blocks in an order drawn anew. So one window of rows is
held at any time, whatever the size of the file.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from gspo_dist.data import schemas
from gspo_dist.data.blocks import RowFile
from gspo_dist.data.cursor import place, resumed_place
from gspo_dist.data.formats import BadRow, Row
from gspo_dist.data.records import BadRows, Record, to_record
from gspo_dist.types import Prompt

log = logging.getLogger(__name__)

WINDOW = 16
"""Blocks whose rows are shuffled together."""
CHUNK = 1 << 16
"""Rows that are compared at a time."""
KEPT = 10
"""Messages about rows that are left out."""
CHECKED = 1000
"""Prompts that are looked at before a run starts; the others are checked when their turn comes."""


class StreamedSource:
    """The prompts of a large file, or of a folder of files."""

    def __init__(
        self,
        name: str,
        rows: RowFile,
        prompt_key: str,
        answer_key: str,
        made: Callable[[Record], Prompt | None],
        bad: BadRows,
    ) -> None:
        """made: a record as its prompt; None where it is too long and left out.

        Raises ValueError for a source without rows.
        """
        self.name, self.made, self.bad = name, made, bad
        self.keys = prompt_key, answer_key
        self.bad_rows = 0
        """Rows left out so far because they are no records, or nothing that the reward can judge."""
        self.too_long = 0
        """Prompts left out for their length so far."""
        self._tell_at = 1
        """Rows left out at which the log says so."""
        self.checks: list[Callable[[Prompt], None]] = []
        """What raises ValueError for a prompt that stops the run."""
        self.readable: list[Callable[[Prompt], None]] = []
        """What raises ValueError for a prompt that is a bad row: nobody could judge its completions."""
        if not len(rows.sizes):
            raise ValueError(f"data file must hold at least one record: {name} is empty")
        self.rows = rows
        self.repeats = self._repeats()
        if len(self.repeats):
            log.warning(
                "%s: %d rows repeat the question of an earlier one: left out", name, len(self.repeats)
            )

    def __len__(self) -> int:
        return int(self.rows.sizes.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """By it a resumed run tells whether the file was edited."""
        return xxhash.xxh64(f"{self.rows.bytes} {self.rows.sizes.tolist()}".encode()).hexdigest()

    def _repeats(self) -> np.ndarray:
        """Rows whose question stands before them, in order. 16 bytes per row are held for it."""
        hashes = np.zeros(len(self), np.uint64)
        for at, (_, row) in enumerate(self.rows.scan()):
            hashes[at] = self._hash(row) or at
        # np.unique with indices would take 50 bytes per row.
        ordered = np.sort(hashes)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        seen: set[int] = set()
        repeated = []
        for start in range(0, len(hashes) if len(twice) else 0, CHUNK):
            part = hashes[start : start + CHUNK]
            place = np.minimum(np.searchsorted(twice, part), len(twice) - 1)
            for offset in np.flatnonzero(twice[place] == part).tolist():
                own = int(part[offset])
                if own in seen:
                    repeated.append(start + offset)
                seen.add(own)
        return np.array(repeated, np.int64)

    def _hash(self, row: Any) -> int:
        """Of the question; 0 for a row without one, which is nobody's repeat."""
        if isinstance(row, BadRow) or not isinstance(row, Mapping):
            return 0
        key = schemas.question_key(row, self.keys[0])
        if key is None:
            return 0
        question = schemas.lookup(row, key)[1]
        text = question if isinstance(question, str) else json.dumps(question, sort_keys=True, default=str)
        return xxhash.xxh64_intdigest(text.encode("utf-8", "replace"))

    def block(self, at: int) -> list[tuple[int, Row]]:
        """(number of the row, row) of a block, without repeats."""
        first = int(self.rows.sizes[:at].sum())
        rows = self.rows.block(at)
        low, high = np.searchsorted(self.repeats, [first, first + len(rows)])
        left_out = set(self.repeats[low:high].tolist())
        return [(first + i, row) for i, row in enumerate(rows) if first + i not in left_out]

    def prompt(self, row: Row) -> Prompt | None:
        """The row as a prompt; None where it is left out. Raises ValueError, naming its place."""
        try:
            record = to_record(*row, *self.keys)
        except ValueError as error:
            self._leave_out(error)
            return None
        prompt = self.made(record)
        if prompt is None:
            self.too_long += 1
            self._tell(f"{record.where}: over rollout.max_prompt_tokens")
            return None
        try:
            for check in self.readable:
                check(prompt)
        except ValueError as error:
            self._leave_out(error)
            return None
        for check in self.checks:
            check(prompt)
        return prompt

    def _leave_out(self, error: ValueError) -> None:
        """Raises `error`, or counts it. The last messages are kept: an endless run has endless ones."""
        self.bad.take(error)
        self.bad_rows += 1
        del self.bad.skipped[:-KEPT]
        self._tell(str(error))

    def _tell(self, last: str) -> None:
        """Says how much is left out after 1, 10, 100, ... rows: no pass over the file ends with a sum."""
        if self.bad_rows + self.too_long >= self._tell_at:
            self._tell_at *= 10
            log.warning(
                "%s: left out so far: %d rows that are no records and %d prompts that are too long; last: %s",
                self.name,
                self.bad_rows,
                self.too_long,
                last,
            )

    def at(self, indices: Sequence[int], known: Mapping[int, Row]) -> list[Prompt]:
        """The prompts of rows that were handed out before. Each block is read once.

        known: rows that are at hand. Raises ValueError for a row that gives no prompt any more.
        """
        found = {index: known[index] for index in indices if index in known}
        missing = sorted(set(indices) - found.keys())
        for at in np.unique(np.searchsorted(np.cumsum(self.rows.sizes), missing, side="right")).tolist():
            own = dict(self.block(at))
            found |= {index: own[index] for index in missing if index in own}
        prompts = []
        for index in indices:
            prompt = self.prompt(found[index]) if index in found else None
            if prompt is None:
                raise ValueError(f"{self.name}: row {index} gives no prompt any more: was the file edited?")
            prompts.append(prompt)
        return prompts

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in the order of the file."""
        repeats = iter(self.repeats.tolist())
        repeat = next(repeats, None)
        for number, row in enumerate(self.rows.scan()):
            if number == repeat:
                repeat = next(repeats, None)
            elif (prompt := self.prompt(row)) is not None:
                yield prompt


class StreamCursor:
    """A place in an endless sequence of epochs over a streamed source: `PromptCursor` without holding it.

    The order of epoch e depends on (seed, e) alone. The place counts blocks and rows of the window, so a
    resumed run reads one window and goes on with the very next prompt.
    """

    def __init__(self, source: StreamedSource, *, seed: int, shuffle: bool = True) -> None:
        self._source, self._seed, self._shuffle = source, seed, shuffle
        self.epoch = 0
        self.position = 0
        """Rows visited in this epoch, those that were left out included."""
        self._window: tuple[int, int] | None = None
        self._order: list[tuple[int, Row]] = []
        self._at_hand: dict[int, Row] = {}
        """The rows of the window by their numbers."""
        self._starts = self._starts_of(0)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. Raises ValueError where a whole epoch gives none."""
        return [prompt for _, prompt in self._take(n)]

    @property
    def size(self) -> int:
        """Rows of the file."""
        return len(self._source)

    def draw(self, n: int) -> list[int]:
        """The row numbers of the next `n` prompts."""
        return [index for index, _ in self._take(n)]

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts of these rows."""
        return self._source.at(indices, self._at_hand)

    def _take(self, n: int) -> list[tuple[int, Prompt]]:
        if n < 1:
            raise ValueError(f"a batch must hold at least one prompt: got {n}")
        batch: list[tuple[int, Prompt]] = []
        fruitless = 0
        while len(batch) < n:
            if self.position == self._starts[-1]:
                self.epoch, self.position = self.epoch + 1, 0
                self._starts = self._starts_of(self.epoch)
            index, row = self._row()
            prompt = self._source.prompt(row)
            self.position += 1
            fruitless = 0 if prompt is not None else fruitless + 1
            if fruitless > self._starts[-1]:
                raise ValueError(
                    f"{self._source.name}: every row is left out: {self._source.too_long} prompts over "
                    f"rollout.max_prompt_tokens, other rows: {self._source.bad.skipped[-1:]}"
                )
            if prompt is not None:
                batch.append((index, prompt))
        return batch

    def _row(self) -> tuple[int, Row]:
        window = int(np.searchsorted(self._starts, self.position, side="right")) - 1
        if self._window != (self.epoch, window):
            blocks = self._blocks_of(self.epoch)[window * WINDOW : (window + 1) * WINDOW]
            rows = [row for block in blocks for row in self._source.block(int(block))]
            if self._shuffle:
                draw = np.random.default_rng([self._seed, self.epoch, window])
                rows = [rows[i] for i in draw.permutation(len(rows))]
            self._window, self._order, self._at_hand = (self.epoch, window), rows, dict(rows)
        return self._order[self.position - int(self._starts[window])]

    def _blocks_of(self, epoch: int) -> np.ndarray:
        blocks = len(self._source.rows.sizes)
        if not self._shuffle:
            return np.arange(blocks)
        return np.random.default_rng([self._seed, epoch]).permutation(blocks)

    def _starts_of(self, epoch: int) -> np.ndarray:
        """[windows + 1] the position at which each window begins, and the end of the epoch."""
        sizes, repeats = self._source.rows.sizes, self._source.repeats
        ends = np.cumsum(sizes)
        kept = sizes - np.diff(np.searchsorted(repeats, np.concatenate([[0], ends])))
        ordered = kept[self._blocks_of(epoch)]
        sums = np.add.reduceat(ordered, np.arange(0, len(ordered), WINDOW))
        return np.concatenate([[0], np.cumsum(sums)])

    def state_dict(self) -> dict[str, Any]:
        """The place, and what must be equal for it to mean the same: plain values, fit for JSON."""
        return place(self.epoch, self.position, self._seed, self._shuffle, self._source)

    def load_state_dict(self, state: Mapping[str, Any], *, accept_other_prompts: bool = False) -> None:
        """Goes to a saved place. Raises what `PromptCursor.load_state_dict` raises."""
        self.epoch, self.position = resumed_place(
            state, self.state_dict(), accept_other_prompts=accept_other_prompts
        )
        self._starts = self._starts_of(self.epoch)
