"""Pure maths of policy optimisation: objectives, advantages, KL, mismatch, and the contract of the log-probs.

Importing this package loads no torch: `names`, `legality`, `recentre` and `clip_width` are standard library
only, so the configuration can be checked in milliseconds. Everything else is loaded at first use (PEP 562).
"""

from __future__ import annotations

import importlib

_HOME = {
    "Segments": "segments",
    "Denominators": "aggregate",
    "Surrogate": "clipping",
    "Objective": "registry",
    "ObjectiveResult": "registry",
    "OBJECTIVES": "registry",
    "get_objective": "registry",
    "Stat": "stats",
    "merge_stats": "stats",
    "all_reduce_stats": "stats",
    "results": "stats",
    "group_advantages": "advantages",
    "degenerate_group_share": "advantages",
    "sequence_log_ratio_std": "registry",
    "Correction": "mismatch",
    "correction": "mismatch",
    "mismatch_stats": "mismatch",
    "mismatch_metrics": "mismatch",
    "offset_in_clip_widths": "clip_width",
    "expected_clip_shares": "clip_width",
    "gaussian_log_ratio": "clip_width",
    "EmaOffset": "recentre",
    "GuardSettings": "recentre",
    "GuardDecision": "recentre",
    "MismatchGuard": "recentre",
    "OffsetEstimate": "recentre",
    "batch_offset": "recentre",
    "offset_from_moments": "recentre",
    "choose_subset": "recentre",
    "subset_offset": "recentre",
    "OBJECTIVE_SPECS": "names",
    "ObjectiveSpec": "names",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
