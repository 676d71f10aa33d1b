"""Rows of data files, one at a time: JSONL, JSON arrays, CSV, Parquet, and folders of the datasets library.

A row that cannot be read comes as a `BadRow` in its place, so that the caller decides whether to stop or to
skip it. What makes the whole file unreadable raises.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
"""Files that are read. A folder may be one that `Dataset.save_to_disk` wrote."""
HUB = "hub:"
"""Prefix of a data set's name on the Hugging Face hub."""
CHUNK = 1 << 20
"""Characters that a JSON array is read by."""
CELL = 1 << 30
"""Characters of a cell of a CSV file; the csv module stops at 131,072 by itself."""
_GAP = re.compile(r"[ \t\r\n,]*")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """A row that is no record; the message names its file and line."""


Row = tuple[str, Any]
"""(where it stands, its value or the BadRow in its place)."""


def is_data(source: str) -> bool:
    """Whether `source` names something that `rows` reads: by its suffix, as a folder, or on the hub."""
    return source.endswith(SUFFIXES) or source.startswith(HUB) or Path(source).expanduser().is_dir()


def rows(source: str, split: str = "train") -> Iterator[Row]:
    """Every row of a source, in order.

    split: which one to take of a saved DatasetDict and of a data set on the hub. Raises ValueError for a
    source that is missing or cannot be read.
    """
    if source.startswith(HUB):
        yield from _folder_rows(hub_folder(source), split)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder_rows(path, split)
        return
    if not path.is_file():
        raise ValueError(
            f"data file must exist: {path} does not; give a .jsonl or .parquet file, or one of "
            f"{', '.join(SUFFIXES)}"
        )
    yield from file_rows(path)


def file_rows(path: Path) -> Iterator[Row]:
    """Every row of one file, read by its suffix."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from csv_rows(path)
    elif path.suffix == ".json":
        yield from json_rows(path)
    else:
        yield from jsonl_rows(path)


def jsonl_rows(path: Path) -> Iterator[Row]:
    # Bytes, not text: only so does an error of the encoding know its line.
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = first_line(path, line)
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, json_line(path, where, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} must be a gzip file: it cannot be read after line {number} ({error}); copy it again"
        ) from error


def first_line(path: Path, line: bytes) -> bytes:
    """The first line of a file without the mark of UTF-8. Raises ValueError where the file is UTF-16."""
    if line.startswith(_UTF16):
        raise ValueError(f"{path} must be UTF-8: it is UTF-16; {_convert(path, 'UTF-16')}")
    return line.removeprefix(_UTF8_MARK)


def json_line(path: Path, where: str, line: bytes) -> Any:
    """The value of one line, or the BadRow in its place."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            f"{where}: the line must be UTF-8: byte 0x{line[error.start]:02x} at column "
            f"{error.start + 1} is not; {_convert(path, 'LATIN1')}, if that is what the file is in"
        )
    except json.JSONDecodeError as error:
        return BadRow(f"{where}: a line must be one JSON object: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or brackets without end
        return BadRow(f"{where}: a line must be one JSON object: {error}")


def json_rows(path: Path) -> Iterator[Row]:
    """The elements of a JSON array, read piece by piece; lines of objects where the file is no array."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(_UTF8_MARK).lstrip()
    if not start.startswith(b"["):
        yield from jsonl_rows(path)
        return
    with path.open(encoding="utf-8-sig") as text:
        try:
            yield from _array(path, text)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8: {error}; {_convert(path, 'LATIN1')}") from None


def _array(path: Path, text: IO[str]) -> Iterator[Row]:
    decoder, line = json.JSONDecoder(), 1
    buffer = text.read(CHUNK).lstrip()  # lstrip may drop lines before the bracket; none are counted
    at = 1
    while True:
        # Moves on in the buffer and cuts it when it grows: a copy for each element would be quadratic.
        gap = _GAP.match(buffer, at)
        start = gap.end() if gap else at
        line += buffer.count("\n", at, start)
        at = start
        if buffer.startswith("]", at):
            _nothing_follows(path, line, buffer[at + 1 :], text)
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
            # A number at the end of the buffer may go on in the next piece.
            if end == len(buffer) and (more := text.read(CHUNK)):
                buffer, at = buffer[at:] + more, 0
                continue
        except json.JSONDecodeError as error:
            # As much again as is there: an element of any size is decoded a few times only.
            if more := text.read(max(CHUNK, len(buffer) - at)):
                buffer, at = buffer[at:] + more, 0
                continue
            lines = buffer.count("\n", at, error.pos)
            raise ValueError(
                f"{path}:{line + lines}: a .json file must be an array of "
                f"objects: {error.msg} at column {error.colno}"
            ) from None
        yield f"{path}:{line}", value
        line += buffer.count("\n", at, end)
        at = end


def _nothing_follows(path: Path, line: int, rest: str, text: IO[str]) -> None:
    """Raises ValueError for anything behind the array: its rows would be lost without a word."""
    while rest:
        if rest.strip():
            line += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
            raise ValueError(
                f"{path}:{line}: a .json file must be one array of objects: {rest.strip()[:40]!r} follows "
                "it; put all rows into one array, or one row per line into a .jsonl file"
            )
        line += rest.count("\n")
        rest = text.read(CHUNK)


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows by the names in the first line. A row is named by its last line, as a cell may have several."""
    csv.field_size_limit(max(CELL, csv.field_size_limit()))
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, dialect="excel-tab" if path.suffix == ".tsv" else "excel", strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} must be UTF-8: after line {reader.line_num}: {error}; "
                    f"{_convert(path, 'LATIN1')}, if that is what the file is in"
                ) from None
            except csv.Error as error:
                raise ValueError(f"{path}:{reader.line_num}: cannot be read as CSV: {error}") from None
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise ValueError(f"{path}:1: columns must have different names: got {', '.join(names)}")
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield where, BadRow(f"{where}: a row must have the {len(names)} columns of the first line")
            else:
                yield where, row


def parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    with unreadable(path, 0), parquet.ParquetFile(path) as table:
        yield from _table_rows(path, table.iter_batches())


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    for path in folder_files(folder, split):
        yield from arrow_rows(path) if path.suffix == ".arrow" else file_rows(path)


def folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of one split of a folder, in order.

    The folder is what `save_to_disk` wrote (state.json beside .arrow files, or a folder for each split), or
    holds files whose names begin with the split. Raises ValueError where there is none.
    """
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in names:
            raise ValueError(f"{folder} must have the split {split!r}: it has {', '.join(names)}")
        folder = folder / split
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    own = [p for p in files if p.name.startswith(split) or split in p.relative_to(folder).parts[:-1]]
    if not own:
        raise ValueError(
            f"{folder} must be a folder that datasets.save_to_disk wrote, or hold files of the split "
            f"{split!r}: it has {', '.join(p.name for p in files[:5]) or 'no data files'}; give one file"
        )
    return own


def arrow_rows(path: Path) -> Iterator[Row]:
    """Rows of an Arrow stream, mapped into memory batch by batch."""
    import pyarrow

    with unreadable(path, 0), pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
        yield from _table_rows(path, batches)


def _table_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number, left = 0, iter(batches)
    while True:
        with unreadable(path, number):
            batch = next(left, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for row in rows:
            yield f"{path}:row {number}", row
            number += 1


@contextmanager
def unreadable(path: Path, number: int) -> Generator[None]:
    """What pyarrow raises in the block becomes a ValueError with the file, the row and the way out."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        kind = "an Arrow stream" if path.suffix == ".arrow" else "a parquet file"
        cause = " ".join(str(error).split())  # pyarrow's messages have several lines
        raise ValueError(
            f"{path} must be {kind}: it cannot be read from row {number} on ({cause}); copy it again, or "
            "give a .jsonl file"
        ) from error


def hub_folder(source: str) -> Path:
    """The local folder of a data set on the hub: from the cache, or downloaded where the hub may be asked.

    HF_HUB_OFFLINE=1 forbids the download. Raises ValueError with the way out.
    """
    from huggingface_hub import snapshot_download

    name = source.removeprefix(HUB)
    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, and those of the network below it
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"data source {source} must be on the hub or in its cache: {cause}; download it with "
            f"`hf download --repo-type dataset {name}`, or give a local file"
        ) from error


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")


def _convert(path: Path, encoding: str) -> str:
    form = "".join(path.suffixes[-1:]) or ".jsonl"
    return f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8{form}"
