"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as partial:` write to `partial`, which becomes `path` when the block ends well.

    `partial` lies beside `path`, because a rename is only atomic within one file system. When the block
    raises, `path` is what it was before and `partial` is removed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """The same for a folder: `with whole_folder(target) as partial:` make and fill `partial`.

    `target` is not there before, or empty. When the block raises, nothing is left beside it.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8: a reader sees the old file or the new one, and the new one is on the disk."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
