"""Names, defaults and parameter rules of the objectives, without torch, so that a configuration can be
checked early.

`registry` binds the names here to their functions; a test keeps the two in step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gspo_dist.checks import choose, nearest

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant_length")
ADVANTAGES = ("group_std", "group_mean", "leave_one_out", "none")
KL_ESTIMATORS = ("k1", "k2", "k3")
OLD_LOGPROBS = ("rollout", "recompute")
ROUTING_REPLAY = ("none", "r2", "r3")
OFFSET_ESTIMATORS = ("batch", "ema", "subset")
GUARD_ACTIONS = ("off", "warn", "recentre", "recompute")

# Correction name -> its bounds and their defaults; formulas and sources stand in `mismatch`.
CORRECTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "token_truncate": {"high": 2.0},
    "token_mask": {"low": 0.5, "high": 5.0},
    "sequence_truncate": {"high": 2.0},
    "sequence_mask": {"low": 0.0, "high": 2.0},
    "geometric_reject": {"low": 0.999, "high": 1.001},
    "veto": {"low": 1e-4},
    "opsm": {"high": 1e-3},
}

# A sequence ratio is a geometric mean: its logarithm is about 1/sqrt(length) of a token's, so a clip made for
# token ratios never binds on it. From this size on it is refused unless the user insists by name.
WIDE_SEQUENCE_CLIP = 0.02


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is fixed about a named objective before any tensor exists.

    aggregation: its own; aggregations: those with which the value keeps the meaning of the paper.
    sequence_level: the clipped ratio is the sequence's. clip: "ratio" (bounds 1 - low, 1 + high), "log"
    (bounds on the log ratio: -low, high) or None (no hard clip).
    """

    name: str
    aggregation: str
    advantage: str
    defaults: Mapping[str, float | None]
    sequence_level: bool = False
    aggregations: tuple[str, ...] = AGGREGATIONS
    clip: str | None = "ratio"
    source: str = ""


def _spec(*args: object, **kwargs: object) -> tuple[str, ObjectiveSpec]:
    spec = ObjectiveSpec(*args, **kwargs)  # type: ignore[arg-type]
    return spec.name, spec


_SEQUENCE = ("sequence_mean",)
OBJECTIVE_SPECS: dict[str, ObjectiveSpec] = dict(
    [
        _spec("gspo", "sequence_mean", "group_std", {"clip_low": 3e-4, "clip_high": 4e-4},
              sequence_level=True, aggregations=_SEQUENCE, source="arXiv 2507.18071 eq 5-7"),
        _spec("gspo_token", "sequence_mean", "group_std", {"clip_low": 3e-4, "clip_high": 4e-4},
              sequence_level=True, aggregations=_SEQUENCE, source="arXiv 2507.18071 eq 13-14"),
        _spec("grpo", "sequence_mean", "group_std", {"clip_low": 0.2, "clip_high": 0.27, "dual_clip": None},
              source="arXiv 2507.18071 eq 2-3; clip of its section 5.1"),
        _spec("dapo", "token_mean", "group_std", {"clip_low": 0.2, "clip_high": 0.28},
              source="arXiv 2503.14476"),
        _spec("dr_grpo", "constant_length", "group_mean", {"clip_low": 0.2, "clip_high": 0.2},
              source="arXiv 2503.20783"),
        _spec("cispo", "token_mean", "group_std", {"clip_low": 1.0, "clip_high": 4.0},
              source="arXiv 2506.13585"),
        _spec("gmpo", "sequence_mean", "group_std", {"clip_low": 0.4, "clip_high": 0.4},
              aggregations=_SEQUENCE, clip="log", source="arXiv 2507.20673"),
        _spec("sapo", "sequence_mean", "group_std", {"tau_positive": 1.0, "tau_negative": 1.05},
              clip=None, source="arXiv 2511.20347"),
        _spec("minirl", "sequence_sum", "group_mean", {"clip_low": 0.2, "clip_high": 0.27},
              source="arXiv 2512.01374"),
        _spec("reinforce", "sequence_sum", "leave_one_out", {}, clip=None, source="arXiv 2402.14740 (RLOO)"),
    ]
)  # fmt: skip


def resolve_params(
    owner: str, defaults: Mapping[str, float | None], params: Mapping[str, object]
) -> dict[str, float | None]:
    """`defaults` overlaid with `params`; an unknown parameter is refused with the nearest known one."""
    for key in params:
        if key not in defaults:
            raise ValueError(f"{owner} has no parameter {key!r}; {nearest(key, defaults)}")
    return {**defaults, **params}  # type: ignore[dict-item]


def _number(owner: str, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{owner}.{field} must be a finite number: got {value!r}")
    return float(value)


def check_clip(owner: str, clip_low: object, clip_high: object, *, log_space: bool = False) -> None:
    """Both are distances (epsilons) from no change, positive, with clip_low <= clip_high (or clip_low = 1:
    off).

    With a ratio clip the bounds are 1 - clip_low and 1 + clip_high, so clip_low lies in (0, 1]; in log space
    (gmpo) they are exp(-clip_low) and exp(clip_high).
    """
    low, high = _number(owner, "clip_low", clip_low), _number(owner, "clip_high", clip_high)
    for field, value in (("clip_low", low), ("clip_high", high)):
        if value <= 0:
            raise ValueError(f"{owner}.{field} must be > 0, a distance from ratio 1: got {value:g}")
    if log_space:
        return
    if low > 1:
        raise ValueError(f"{owner}.clip_low must be <= 1, the ratio is never negative: got {low:g}")
    if 0.5 <= low < 1 < high < 2:
        raise ValueError(
            f"{owner}.clip_low and clip_high are distances, not bounds: got {low:g} and {high:g}; "
            f"for the bounds [{low:g}, {high:g}] give clip_low={1 - low:g}, clip_high={high - 1:g}"
        )
    if low > high and low < 1:
        raise ValueError(
            f"{owner}.clip_low must be <= clip_high (or 1, which turns the lower bound off): got {low:g} > "
            f"{high:g}; they look swapped"
        )


def check_params(owner: str, params: Mapping[str, object], *, clip: str | None = "ratio") -> None:
    """Range checks of every parameter that the built-in objectives know; ValueError names owner and field."""
    if "clip_low" in params and "clip_high" in params:
        check_clip(owner, params["clip_low"], params["clip_high"], log_space=clip == "log")
    if params.get("dual_clip") is not None:
        dual = _number(owner, "dual_clip", params["dual_clip"])
        floor = 1 + float(params["clip_high"])  # type: ignore[arg-type]
        if dual <= floor:
            raise ValueError(
                f"{owner}.dual_clip must be > 1 + clip_high = {floor:g}: got {dual:g}; usual is 3"
            )
    for field in ("tau_positive", "tau_negative"):
        if field in params and _number(owner, field, params[field]) <= 0:
            raise ValueError(f"{owner}.{field} must be > 0: got {params[field]}")


def check_correction(
    name: object, *, low: float | None = None, high: float | None = None
) -> dict[str, float]:
    """The bounds in force of a correction (None: its default); ValueError on an unknown name, bound or
    range."""
    kind = choose("correction", name, CORRECTIONS)
    owner = f"correction {kind}"
    given = {key: value for key, value in (("low", low), ("high", high)) if value is not None}
    resolved = resolve_params(owner, CORRECTIONS[kind], given)
    values = {key: _number(owner, key, value) for key, value in resolved.items()}
    if values.get("low", 0.0) < 0 or values.get("high", 1.0) <= 0:
        raise ValueError(f"{owner}: low must be >= 0 and high > 0: got {values}")
    if kind == "opsm":
        return values
    if values.get("low", 0.0) > 1 or values.get("high", 1.0) < 1:
        raise ValueError(f"{owner} must accept the ratio 1, so low <= 1 <= high: got {values}")
    return values
