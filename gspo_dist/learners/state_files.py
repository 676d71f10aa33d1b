"""Files of a learner's state: written and read with messages that name the file, and the layout beside them.

The layout says how the state was cut into files. A learner that cannot read another cut compares it before it
reads anything, and `check_resume` compares it before any process starts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from gspo_dist.config import LearnerConfig

LAYOUT = "layout.json"
# What torch's zip writer says (2.13) when the file took less than it was given.
_SHORT_WRITES = ("PytorchStreamWriter failed", "iostream error", "unexpected pos", "No space left")


def layout_of(config: LearnerConfig) -> dict[str, Any]:
    """The knobs, by their names in the configuration, that decide which files a state has and
    what is in them."""
    layout: dict[str, Any] = {"learner.backend": config.backend, "learner.precision": config.precision}
    if config.backend == "deepspeed":
        layout |= {
            "learner.world_size": config.world_size,
            "learner.deepspeed.zero_stage": config.deepspeed.zero_stage,
            "learner.deepspeed.expert_parallel": config.deepspeed.expert_parallel,
        }
    return layout


def write_layout(folder: Path, config: LearnerConfig) -> None:
    """Puts the layout beside the state; one rank does it."""
    (folder / LAYOUT).write_text(json.dumps(layout_of(config), indent=2) + "\n", encoding="utf-8")


def check_resume(folder: Path, config: LearnerConfig) -> None:
    """Raises ValueError unless a learner of `config` can load the state in `folder` (`Learner.save`'s).

    It names every knob that differs with both values. Cheap: it reads one small file, and may be called
    before any process starts. A state without a layout (of an earlier version, or of a backend that reads
    every layout of its own) passes.
    """
    path = folder / LAYOUT
    if not path.is_file():
        return
    try:
        saved: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is torn: remove this checkpoint to go on from the one before") from error
    wanted = layout_of(config)
    differ = [key for key in saved if saved[key] != wanted.get(key)]
    if not differ:
        return
    if "learner.backend" in differ:
        differ = ["learner.backend"]  # the other knobs mean something else there
    changes = "; ".join(f"{key} was {saved[key]} and is {wanted.get(key)}" for key in differ)
    back = " ".join(f"{key}={saved[key]}" for key in differ)
    raise ValueError(
        f"checkpoint {folder} can only be loaded with the layout that saved it: {changes}. Resume with "
        f"{back}, or export the checkpoint (gspo export) and start a new run from that folder, with a fresh "
        "optimiser"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes a state to `path`, a file or a folder.

    Raises OSError with the errno of a full disk, the path and what is free there, where torch, DeepSpeed and
    megatron-core raise an error without a place. Other errors pass, as an Exception: what torch raises for
    several ranks is none (2.13), and would end a process past everything that tells how a run ended.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, OSError):
            code = error.errno
        else:
            code = errno.ENOSPC if any(text in str(error) for text in _SHORT_WRITES) else None
        if code not in (errno.ENOSPC, errno.EDQUOT):
            if isinstance(error, CheckpointException):
                raise RuntimeError(f"the learner's state was not written to {path}: {error}") from error
            raise
        disk = os.statvfs(path if path.is_dir() else path.parent)
        free = disk.f_bavail * disk.f_frsize / 2**20
        raise OSError(
            code, f"no room for the learner's state ({free:,.0f} MiB free there; free some)", str(path)
        ) from error


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Saves `state` to `path` with torch. Raises OSError as `writing` does."""
    with writing(path):
        torch.save(dict(state), path)


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_state` saved. Raises ValueError, naming the file, when it is missing or torn, or has
    more in it than tensors and plain values.
    """
    return _load(path, map_location=device)


def map_state(path: Path, trusted: Sequence[Any] | None = None) -> dict[str, Any]:
    """What `write_state` or a learner's own writer saved, its tensors mapped: a page is read when it is used.

    trusted: what may lie in the file beside tensors and plain values: classes, or (a function, the full name
    that it stands for). Raises as `read_state` does.
    """
    with torch.serialization.safe_globals(list(trusted or ())):
        return _load(path, map_location="cpu", mmap=True)


def _load(path: Path, **how: Any) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"checkpoint {path.parent} has no {path.name}: it is torn, or of another backend")
    try:
        return torch.load(path, weights_only=True, **how)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        # EINVAL is what a zip without its end gives.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # torch (2.13) gives one kind of error to a torn file and to a class that it does not trust.
        if found := re.search(
            r"Unsupported global: (?:GLOBAL )?(.+?)(?: was not an allowed|\n|$)", str(error)
        ):
            raise ValueError(
                f"{path} is whole, but holds {found[1]}, which this version does not read: read it with the "
                "Python and the packages that saved it"
            ) from error
        raise ValueError(
            f"{path} is torn ({path.stat().st_size:,} bytes): remove this checkpoint to go on from the one "
            "before"
        ) from error
