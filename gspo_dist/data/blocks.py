"""Files that are read block by block, from any place: JSONL, Parquet, Arrow streams, and folders of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gspo_dist.data.formats import Row, first_line, json_line, unreadable

BLOCK = 1024
"""Rows of a block, at most."""
READ_BYTES = 1 << 20
"""Of a Parquet column that are held at a time: a row group may have gigabytes."""


class RowFile(Protocol):
    """Rows in blocks."""

    sizes: np.ndarray
    """[blocks] rows of each block."""
    bytes: int
    """That the rows take on disk."""

    def block(self, at: int) -> list[Row]:
        """The rows of a block."""
        ...

    def scan(self) -> Iterator[Row]:
        """All rows in order, in one pass."""
        ...


class JsonlFile:
    """Blocks of lines. Empty lines are no rows."""

    def __init__(self, path: Path) -> None:
        """Notes where the blocks begin. Raises ValueError where the file is UTF-16."""
        self.path, self.bytes = path, path.stat().st_size
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

    def scan(self) -> Iterator[Row]:
        for at in range(len(self.sizes)):
            yield from self.block(at)


class TableFile(ABC):
    """A file of row groups, each of which is read from its start. A block is a slice of one.

    Row groups are as large as the writer liked: pyarrow and pandas put a million rows into one. What comes
    before a block is decoded and passed over, and only its own rows become Python values.
    """

    def __init__(self, path: Path, groups: Sequence[int]) -> None:
        """groups: rows of each row group."""
        self.path, self.bytes = path, path.stat().st_size
        places = [
            (group, start, min(BLOCK, rows - start))
            for group, rows in enumerate(groups)
            for start in range(0, rows, BLOCK)
        ]
        self.places = np.array(places, np.int64).reshape(-1, 3)
        """[blocks, 3] row group, first row in it, rows."""
        self.sizes = self.places[:, 2]
        self.firsts = np.cumsum(self.sizes) - self.sizes

    def block(self, at: int) -> list[Row]:
        group, skip, wanted = self.places[at].tolist()
        number, found = int(self.firsts[at]), list[Any]()
        with unreadable(self.path, number), self.batches(group) as batches:
            for batch in batches:
                found += batch.slice(skip, wanted - len(found)).to_pylist() if skip < len(batch) else []
                skip = max(0, skip - len(batch))
                if len(found) == wanted:
                    break
        if len(found) < wanted:
            raise ValueError(f"{self.path} ends at row {number + len(found)}: it was cut since the run began")
        return [(f"{self.path}:row {number + i}", row) for i, row in enumerate(found)]

    def scan(self) -> Iterator[Row]:
        number = 0
        for group in np.unique(self.places[:, 0]).tolist():
            with unreadable(self.path, number), self.batches(group) as batches:
                for batch in batches:
                    for row in batch.to_pylist():
                        yield f"{self.path}:row {number}", row
                        number += 1

    @abstractmethod
    @contextmanager
    def batches(self, group: int) -> Generator[Iterator[Any]]:
        """The record batches of a row group, while the block lasts."""


class ParquetFile(TableFile):
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        with unreadable(path, 0), parquet.ParquetFile(path) as table:
            metadata = table.metadata
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        super().__init__(path, groups)

    @contextmanager
    def batches(self, group: int) -> Generator[Iterator[Any]]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.path, buffer_size=READ_BYTES) as table:
            yield table.iter_batches(batch_size=BLOCK, row_groups=[group])


class ArrowFile(TableFile):
    """An Arrow stream, as `Dataset.save_to_disk` writes it: one group, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with unreadable(path, 0), self.batches(0) as batches:
            rows = sum(len(batch) for batch in batches)
        super().__init__(path, [rows])

    @contextmanager
    def batches(self, group: int) -> Generator[Iterator[Any]]:
        import pyarrow

        with pyarrow.memory_map(str(self.path)) as file, pyarrow.ipc.open_stream(file) as batches:
            yield iter(batches)


class FileChain:
    """The blocks of several files, one file after the other."""

    def __init__(self, files: Sequence[RowFile]) -> None:
        self.files, self.bytes = list(files), sum(file.bytes for file in files)
        self.sizes = np.concatenate([file.sizes for file in files])
        self.ends = np.cumsum([len(file.sizes) for file in files])

    def block(self, at: int) -> list[Row]:
        own = int(np.searchsorted(self.ends, at, side="right"))
        return self.files[own].block(at - int(self.ends[own]) + len(self.files[own].sizes))

    def scan(self) -> Iterator[Row]:
        for file in self.files:
            yield from file.scan()


FORMS: dict[str, type[JsonlFile] | type[ParquetFile] | type[ArrowFile]] = {
    ".jsonl": JsonlFile,
    ".parquet": ParquetFile,
    ".arrow": ArrowFile,
}


def open_rows(source: str, paths: Sequence[Path]) -> RowFile:
    """The files of a source as one. Raises ValueError for a form that cannot be read from the middle."""
    for path in paths:
        if path.suffix not in FORMS:
            whose = source if source == str(path) else f"{source} ({path.name})"
            raise ValueError(
                f"{whose} is over data.stream_above_mb, and only .jsonl, .parquet and .arrow are read piece "
                "by piece: convert it, or raise the limit to hold it in memory"
            )
    files = [FORMS[path.suffix](path) for path in paths]
    return files[0] if len(files) == 1 else FileChain(files)
