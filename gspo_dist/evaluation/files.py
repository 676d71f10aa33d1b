"""Local copies of published data below `data.root`. Nothing is downloaded."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path

from gspo_dist.data.formats import SUFFIXES

log = logging.getLogger(__name__)


def find(suite: str, root: str | None, given: str | None, patterns: Sequence[str], source: str) -> Path:
    """The file or folder of a suite: `given`, or the first below `root` whose name fits one of `patterns`.

    patterns: lower-case globs of names, the best first. One with a slash is of the path from `root` on, its
    own name included: for names that several data sets have, such as test.jsonl. source: who has a copy.

    Where several copies fit, the first in the order of patterns and paths is taken, and the log says so.
    Raises ValueError with the place to look and the way out.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path if path.is_absolute() or root is None or path.exists() else Path(root).expanduser() / path
        if not path.exists():
            raise ValueError(f"evaluation.options.{suite}: no such file: {path}; {_where(suite, source)}")
        return path
    if root is None:
        raise ValueError(
            f"suite {suite} needs a local copy of its data: set data.root to a folder; "
            f"{_where(suite, source)}"
        )
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data.root must be a folder: {folder} is none")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(SUFFIXES)]
    for pattern in patterns:
        fits = [path for path in files if _fits(path, folder, pattern)]
        if fits:
            if len(fits) > 1:
                log.warning(
                    "suite %s: %s is taken; there are also %s. `gspo data A --against B` compares two "
                    "copies; evaluation.options.%s.file chooses one",
                    suite,
                    fits[0],
                    ", ".join(path.name for path in fits[1:6]),
                    suite,
                )
            return fits[0]
    raise ValueError(
        f"suite {suite} found no file below {folder} whose name fits {' or '.join(patterns)}; "
        f"{_where(suite, source)}"
    )


def _fits(path: Path, folder: Path, pattern: str) -> bool:
    text = f"{folder.name}/{path.relative_to(folder).as_posix()}" if "/" in pattern else path.name
    return fnmatch.fnmatchcase(text.lower(), pattern)


def _where(suite: str, source: str) -> str:
    return f"it can be had from {source}; put it there, or name it: evaluation.options.{suite}.file=PATH"
