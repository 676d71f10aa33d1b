"""How a run of a study ended, as its folder keeps it (status.json)."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gspo_dist.metrics.jsonl import write_json

log = logging.getLogger(__name__)

STATUS = "status.json"


@dataclass(frozen=True)
class Ending:
    """The recorded end of one run."""

    arm: str
    """Name of its settings in the study."""
    seed: int
    """Of the run."""
    status: str
    """done, diverged (a loss, gradient or log-prob was not finite) or died (anything else)."""
    reason: str
    """The last error that its log names; empty for done."""
    seconds: float
    """What its process took, this attempt only."""
    steps_logged: int
    """The last step in metrics.jsonl."""
    command: list[str]
    """Arguments of the interpreter that made it: how a run of other settings is told from this one."""


def read_ending(folder: Path) -> Ending | None:
    """How the run in `folder` ended, or None for one without a recorded end.

    A torn file (a full disk, a machine that lost power) is said in the log and counts as no end: the run then
    goes on from its checkpoint, which at worst repeats its last steps.
    """
    path = folder / STATUS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Ending(**{field.name: content[field.name] for field in fields(Ending)})
    except (ValueError, KeyError, TypeError):
        log.warning("%s is torn: the run counts as not ended and goes on from its checkpoint", path)
        return None


def write_ending(folder: Path, ending: Ending) -> None:
    """Records the end. Raises OSError where the disk does not take it; an older file is then as it was."""
    write_json(folder / STATUS, asdict(ending))
