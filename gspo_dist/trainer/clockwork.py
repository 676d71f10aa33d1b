"""How long the engines sample between two publications: by the clock, by a number of ticks, or by a record.

A tick is one decode step of an engine. Which tokens a publication finds is decided by the ticks that every
engine did since the last one. So with `rollout.ticks_per_step` a run is a function of its seed. Without it
the ticks of each engine are written to ticks.jsonl, and `rollout.replay_ticks` makes another run do the same
ones: an asynchronous run that went wrong can be looked at again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_dist.config import RolloutConfig, RunConfig
from gspo_dist.config.mapping import leaves, to_mapping
from gspo_dist.metrics.jsonl import append, cut_back, read_jsonl
from gspo_dist.metrics.sinks import going_on_without

log = logging.getLogger(__name__)

TICKS = "ticks.jsonl"
SLICE_S = 0.25
"""Seconds of a slice by the clock. A learner that is done waits for the rest of the slice under way."""
SLICE_TICKS = 8
"""Ticks of a slice by count."""
SAME = (
    "seed",
    "rollout.engine",
    "rollout.engines",
    "rollout.max_num_seqs",
    "rollout.kv_cache_gib",
    "rollout.steps_ahead",
    "rollout.prompts_per_step",
    "rollout.group_size",
    "rollout.max_prompt_tokens",
    "rollout.max_completion_tokens",
    "rollout.length_schedule",
    "objective.selection.degenerate",
    "objective.selection.over_asked",
    "objective.selection.tries",
    "rollout.temperature",
    "mini_batches",
)
"""Settings that a record of ticks depends on."""


@dataclass(frozen=True)
class Slice:
    """How long every engine samples before it tells what it has."""

    ticks: int | Mapping[str, int] | None
    """Of all engines, or of each by name; None: as many as fit."""
    seconds: float | None
    """None: however long the ticks take."""


class Clockwork:
    """Counts the ticks of every engine since the last publication, and says how long the next slice is."""

    def __init__(
        self, config: RolloutConfig, record: Record | None = None, folder: Path | None = None
    ) -> None:
        """record: of the run to repeat. folder: where ticks.jsonl is written."""
        self.beside = config.ticks_per_step
        self.record, self.folder = record, folder
        self.is_by_the_clock = self.beside is None and record is None
        self.step = self.left_beside = 0
        self.done: dict[str, int] = {}

    def begin(self, step: int) -> None:
        """A publication is over: the ticks of `step` are counted from here."""
        self.step, self.done, self.left_beside = step, {}, self.beside or 0

    def note(self, engine: str, ticks: int) -> None:
        """Counts ticks that an engine has done."""
        if ticks:
            self.done[engine] = self.done.get(engine, 0) + ticks

    def slice(self) -> Slice:
        """The next slice while a step is collected. ValueError: the record knows of no more."""
        if self.record is not None:
            left = self._left_of_record()
            if not any(left.values()):
                raise self.off_the_record()
            return Slice(left, None)
        return Slice(None, SLICE_S) if self.is_by_the_clock else Slice(SLICE_TICKS, None)

    def off_the_record(self) -> ValueError:
        """What is raised when the recorded ticks do not sample the step."""
        return ValueError(
            f"rollout.replay_ticks: step {self.step} is not sampled after its recorded ticks "
            f"({(self.record or {}).get(self.step)}): the record is of another run, or of other weights"
        )

    def slice_beside(self, is_learned: bool) -> Slice | None:
        """The next slice beside the learner; None: that was the last one."""
        if self.record is not None:
            left = self._left_of_record()
            return Slice(left, None) if any(left.values()) else None
        if self.is_by_the_clock:
            return None if is_learned else Slice(None, SLICE_S)
        ticks = min(SLICE_TICKS, self.left_beside)
        self.left_beside -= ticks
        return Slice(ticks, None) if ticks else None

    def _left_of_record(self) -> dict[str, int]:
        ticks = (self.record or {}).get(self.step, {})
        return {engine: min(SLICE_TICKS, n - self.done.get(engine, 0)) for engine, n in ticks.items()}

    def close(self, deaths: Sequence[str] = ()) -> None:
        """The engines are empty: writes what they did for this step. Doing it again does nothing.

        deaths: engines that died meanwhile; ticks alone do not repeat that.
        """
        if self.folder is None or not self.step:
            return
        row: dict[str, Any] = {"step": self.step, "ticks": self.done}
        with going_on_without(TICKS):
            append(self.folder / TICKS, [row | ({"deaths": list(deaths)} if deaths else {})])
        self.step = 0


Record = Mapping[int, Mapping[str, int]]
"""Step -> engine -> ticks from the publication before it to the one after it."""


def open_record(folder: Path, config: RunConfig, completed_steps: int) -> None:
    """Begins ticks.jsonl, or cuts it back to where a run goes on."""
    path = folder / TICKS
    cut_back(path, completed_steps)
    if not read_jsonl(path):
        append(path, [{"step": 0, "run": settings(config)}])


def settings(config: RunConfig) -> dict[str, Any]:
    """What a record of ticks depends on, by key."""
    flat = dict(leaves(to_mapping(config)))
    return {key: flat[key] for key in SAME}


def read_record(path: Path, config: RunConfig) -> Record:
    """The ticks of an earlier run. ValueError: there are none, or those of another or a shorter run."""
    rows = read_jsonl(path)
    if not rows or "run" not in rows[0]:
        raise ValueError(
            "rollout.replay_ticks must be the ticks.jsonl of a run with rollout.steps_ahead > 0: got "
            f"{path}, which {'has no such record' if path.is_file() else 'is not there'}"
        )
    now = settings(config)
    other = {key: (old, now[key]) for key, old in rows[0]["run"].items() if key in now and now[key] != old}
    if other:
        told = ", ".join(f"{key} (was {old!r}, now {new!r})" for key, (old, new) in other.items())
        raise ValueError(f"rollout.replay_ticks={path} is of another run: {told}; restore them, or unset it")
    record = {row["step"]: row["ticks"] for row in rows[1:]}
    if max(record, default=0) < config.steps:
        raise ValueError(
            f"rollout.replay_ticks={path} has ticks of {max(record, default=0)} steps: got steps = "
            f"{config.steps}; set steps to what there is"
        )
    dead = [row["step"] for row in rows[1:] if row.get("deaths")]
    if dead:
        log.warning("%s: an engine died in step %d; the run repeats itself up to there", path, dead[0])
    return record
