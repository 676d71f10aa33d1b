"""Pure maths of policy optimisation: objectives, advantages, KL, mismatch, the offset of engine log-probs.

Importing this package loads no torch: `specs`, `legality` and `offset` need the standard library only, so
that a configuration is checked in milliseconds. The names below are loaded at first use (PEP 562). Type
checkers and editors see the real classes and functions through the imports under TYPE_CHECKING; a test keeps
the three lists equal.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_dist.objectives.advantages import group_advantages
    from gspo_dist.objectives.aggregate import Denominators, Segments
    from gspo_dist.objectives.mismatch import Correction, correction, mismatch_metrics, mismatch_stats
    from gspo_dist.objectives.objective import OBJECTIVES, Objective, ObjectiveResult, get_objective
    from gspo_dist.objectives.offset import Clip
    from gspo_dist.objectives.specs import OBJECTIVE_SPECS, ObjectiveSpec
    from gspo_dist.objectives.surrogate import Surrogate

__all__ = [
    "OBJECTIVES",
    "OBJECTIVE_SPECS",
    "Clip",
    "Correction",
    "Denominators",
    "Objective",
    "ObjectiveResult",
    "ObjectiveSpec",
    "Segments",
    "Surrogate",
    "correction",
    "get_objective",
    "group_advantages",
    "mismatch_metrics",
    "mismatch_stats",
]

_HOME = {
    "OBJECTIVES": "objective",
    "OBJECTIVE_SPECS": "specs",
    "Clip": "offset",
    "Correction": "mismatch",
    "Denominators": "aggregate",
    "Objective": "objective",
    "ObjectiveResult": "objective",
    "ObjectiveSpec": "specs",
    "Segments": "aggregate",
    "Surrogate": "surrogate",
    "correction": "mismatch",
    "get_objective": "objective",
    "group_advantages": "advantages",
    "mismatch_metrics": "mismatch",
    "mismatch_stats": "mismatch",
}
"""Exported name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
