"""Pure maths of policy optimisation: objectives, advantages, KL, mismatch, and the offset of engine log-probs.

Importing this package loads no torch: `specs`, `legality` and `offset` are standard library only, so a configuration can
be checked in milliseconds. Everything else is loaded at first use (PEP 562). Type checkers and editors see the real
classes and functions through the imports under TYPE_CHECKING; a test keeps the two lists equal.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_dist.objectives.advantages import degenerate_group_share, group_advantages
    from gspo_dist.objectives.aggregate import Denominators, Segments
    from gspo_dist.objectives.losses import Surrogate
    from gspo_dist.objectives.mismatch import Correction, correction, mismatch_metrics, mismatch_stats
    from gspo_dist.objectives.objective import (
        OBJECTIVES,
        Objective,
        ObjectiveResult,
        get_objective,
    )
    from gspo_dist.objectives.offset import (
        EmaOffset,
        GuardDecision,
        MismatchGuard,
        OffsetEstimate,
        batch_offset,
        choose_subset,
        expected_clip_shares,
        offset_from_moments,
        offset_in_clip_widths,
        subset_offset,
    )
    from gspo_dist.objectives.specs import OBJECTIVE_SPECS, ObjectiveSpec

__all__ = [
    "OBJECTIVES",
    "OBJECTIVE_SPECS",
    "Correction",
    "Denominators",
    "EmaOffset",
    "GuardDecision",
    "MismatchGuard",
    "Objective",
    "ObjectiveResult",
    "ObjectiveSpec",
    "OffsetEstimate",
    "Segments",
    "Surrogate",
    "batch_offset",
    "choose_subset",
    "correction",
    "degenerate_group_share",
    "expected_clip_shares",
    "get_objective",
    "group_advantages",
    "mismatch_metrics",
    "mismatch_stats",
    "offset_from_moments",
    "offset_in_clip_widths",
    "subset_offset",
]

_HOME = {
    "OBJECTIVES": "objective",
    "OBJECTIVE_SPECS": "specs",
    "Correction": "mismatch",
    "Denominators": "aggregate",
    "EmaOffset": "offset",
    "GuardDecision": "offset",
    "MismatchGuard": "offset",
    "Objective": "objective",
    "ObjectiveResult": "objective",
    "ObjectiveSpec": "specs",
    "OffsetEstimate": "offset",
    "Segments": "aggregate",
    "Surrogate": "losses",
    "batch_offset": "offset",
    "choose_subset": "offset",
    "correction": "mismatch",
    "degenerate_group_share": "advantages",
    "expected_clip_shares": "offset",
    "get_objective": "objective",
    "group_advantages": "advantages",
    "mismatch_metrics": "mismatch",
    "mismatch_stats": "mismatch",
    "offset_from_moments": "offset",
    "offset_in_clip_widths": "offset",
    "subset_offset": "offset",
}
"""Exported name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
