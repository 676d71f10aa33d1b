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
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from gspo_dist.data import schemas
from gspo_dist.data.cursor import place, resumed_place
from gspo_dist.data.formats import BadRow, Row, first_line, json_line
from gspo_dist.data.records import BadRows, Record, to_record
from gspo_dist.types import Prompt

log = logging.getLogger(__name__)

BLOCK = 1024
"""Rows of a block of JSONL. Blocks of Parquet are its row groups."""
WINDOW = 16
"""Blocks whose rows are shuffled together."""
CHUNK = 1 << 16
"""Rows that are compared at a time."""
CHECKED = 1000
"""Prompts that are looked at before a run starts; the others are checked when their turn comes."""


class RowFile(Protocol):
    """A file that can be read block by block."""

    sizes: np.ndarray
    """[blocks] rows of each block."""

    def block(self, at: int) -> list[Row]:
        """The rows of a block."""
        ...


class JsonlFile:
    """Blocks of lines. Empty lines are no rows."""

    def __init__(self, path: Path) -> None:
        """Notes where the blocks begin. Raises ValueError where the file is UTF-16."""
        self.path = path
        starts, lines, sizes, rows = [0], [1], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(iter(file.readline, b""), start=1):
                if number == 1:
                    line = first_line(path, line)
                if not line.strip():
                    continue
                rows += 1
                if rows == BLOCK:
                    sizes.append(rows)
                    starts.append(file.tell())
                    lines.append(number + 1)
                    rows = 0
        if rows:
            sizes.append(rows)
        self.starts, self.lines, self.sizes = np.array(starts), np.array(lines), np.array(sizes, np.int64)

    def block(self, at: int) -> list[Row]:
        found: list[Row] = []
        with self.path.open("rb") as file:
            file.seek(int(self.starts[at]))
            number = int(self.lines[at])
            while len(found) < self.sizes[at]:
                line = file.readline()
                if not line:
                    raise ValueError(f"{self.path} ends at line {number}: it was cut since the run began")
                if number == 1:
                    line = first_line(self.path, line)
                if line.strip():
                    where = f"{self.path}:{number}"
                    found.append((where, json_line(self.path, where, line)))
                number += 1
        return found


class ParquetFile:
    """Blocks are row groups."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self.path = path
        with parquet.ParquetFile(path) as table:
            metadata = table.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.sizes = np.array([size for size in sizes if size], np.int64)
        self.groups = [i for i, size in enumerate(sizes) if size]
        self.firsts = np.cumsum(self.sizes) - self.sizes

    def block(self, at: int) -> list[Row]:
        from pyarrow import parquet

        first = int(self.firsts[at])
        with parquet.ParquetFile(self.path) as table:
            rows = table.read_row_group(self.groups[at]).to_pylist()
        return [(f"{self.path}:row {first + i}", row) for i, row in enumerate(rows)]


def open_rows(path: Path) -> RowFile | None:
    """The file by its suffix; None for a form that cannot be read from the middle."""
    if path.suffix == ".jsonl":
        return JsonlFile(path)
    return ParquetFile(path) if path.suffix == ".parquet" else None


class StreamedSource:
    """The prompts of one large file."""

    def __init__(
        self,
        path: Path,
        prompt_key: str,
        answer_key: str,
        made: Callable[[Record], Prompt | None],
        bad: BadRows,
    ) -> None:
        """made: a record as its prompt; None where it is too long and left out.

        Raises ValueError for a file without rows, or of a form that cannot be streamed.
        """
        self.name = str(path)
        self.path, self.made, self.bad = path, made, bad
        self.keys = prompt_key, answer_key
        self.too_long = 0
        """Prompts left out for their length so far."""
        self._tell_at = 1
        """Rows left out at which the log says so."""
        self.checks: list[Callable[[Prompt], None]] = []
        """What raises ValueError for a prompt that cannot be trained on."""
        rows = open_rows(path)
        if rows is None:
            raise ValueError(
                f"{path} is over data.stream_above_mb, and only .jsonl and .parquet are read piece by piece: "
                "convert it, or raise the limit to hold it in memory"
            )
        if not len(rows.sizes):
            raise ValueError(f"data file must hold at least one record: {path} is empty")
        self.rows = rows
        self.repeats = self._repeats()
        if len(self.repeats):
            log.warning(
                "%s: %d rows repeat the question of an earlier one: left out", path, len(self.repeats)
            )

    def __len__(self) -> int:
        return int(self.rows.sizes.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """By it a resumed run tells whether the file was edited."""
        return xxhash.xxh64(f"{self.path.stat().st_size} {self.rows.sizes.tolist()}".encode()).hexdigest()

    def _repeats(self) -> np.ndarray:
        """Rows whose question stands before them, in order. 16 bytes per row are held for it."""
        hashes, at = np.zeros(len(self), np.uint64), 0
        for block in range(len(self.rows.sizes)):
            for _, row in self.rows.block(block):
                hashes[at] = self._hash(row) or at
                at += 1
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
            self.bad.take(error)
            self._tell(str(error))
            return None
        prompt = self.made(record)
        if prompt is None:
            self.too_long += 1
            self._tell(f"{record.where}: over rollout.max_prompt_tokens")
            return None
        for check in self.checks:
            check(prompt)
        return prompt

    def _tell(self, last: str) -> None:
        """Says how much is left out after 1, 10, 100, ... rows: no pass over the file ends with a sum."""
        bad = len(self.bad.skipped)
        if bad + self.too_long >= self._tell_at:
            self._tell_at *= 10
            log.warning(
                "%s: left out so far: %d rows that are no records and %d prompts that are too long; last: %s",
                self.name,
                bad,
                self.too_long,
                last,
            )

    def at(self, index: int) -> Prompt:
        """The prompt of a row that was handed out before. Raises ValueError where it is none any more."""
        block = int(np.searchsorted(np.cumsum(self.rows.sizes), index, side="right"))
        row = dict(self.block(block)).get(index)
        prompt = self.prompt(row) if row is not None else None
        if prompt is None:
            raise ValueError(f"{self.name}: row {index} gives no prompt any more: was the file edited?")
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in the order of the file."""
        for at in range(len(self.rows.sizes)):
            for _, row in self.block(at):
                if (prompt := self.prompt(row)) is not None:
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
        return [self._source.at(index) for index in indices]

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
                    f"{self._source.name}: every row is left out: {self._source.bad.skipped[-1:]}"
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
            self._window, self._order = (self.epoch, window), rows
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
