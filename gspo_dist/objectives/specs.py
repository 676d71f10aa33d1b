"""Names, defaults and parameter rules of the objectives. Without torch, so that a config is checked early.

`objective` binds the names here to the functions of `losses`, and `legality` says which of them go together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import choose, nearest

# --- the names on every axis ---

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant_length")
ADVANTAGES = ("group_std", "group_mean", "leave_one_out", "batch_std", "maxrl", "gdpo", "none")
CREDITS = ("episode", "position", "turn")
KL_ESTIMATORS = ("k1", "k2", "k3")
OLD_LOGPROBS = ("rollout", "recompute")
ROUTING_REPLAY = ("none", "r2", "r3")
OFFSET_ESTIMATORS = ("batch", "ema", "subset")
GUARD_ACTIONS = ("off", "warn", "recentre", "recompute")

CORRECTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "token_truncate": {"high": 2.0},
    "token_mask": {"low": 0.5, "high": 5.0},
    "sequence_truncate": {"high": 2.0},
    "sequence_mask": {"low": 0.0, "high": 2.0},
    "geometric_reject": {"low": 0.999, "high": 1.001},
    "geometric_truncate": {"high": 2.0},
    "veto": {"low": 1e-4},
    "opsm": {"high": 1e-3},
}
"""Correction name -> its bounds and their defaults. Formulas and sources stand in `mismatch`."""

WIDE_SEQUENCE_CLIP = 0.02
"""Clip size from which an objective on sequence ratios is refused unless the user insists by name.

A sequence ratio is a geometric mean. Its logarithm is about 1/sqrt(length) of a token's, so a clip made for
token ratios never binds on it.
"""


# --- the objectives ---


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is fixed about an objective before any tensor exists.

    Raises ValueError for an unknown aggregation, advantage estimator or kind of clip.
    """

    name: str
    """What messages and reports call it."""
    aggregation: str
    """Its own: token_mean | sequence_mean | sequence_sum | constant_length (`aggregate`)."""
    advantage: str = "group_std"
    """The estimator it was published with, one of ADVANTAGES."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The parameters of its surrogate and their values."""
    sequence_level: bool = False
    """Whether the ratio that is clipped is the sequence's."""
    clip: str | None = "ratio"
    """How clip_low and clip_high are read, where it has them: "ratio" (bounds 1 - low and 1 + high), "log"
    (bounds -low and high on the log ratio), or None (no hard clip). The guard's offset is measured in it."""
    aggregations: tuple[str, ...] = AGGREGATIONS
    """Those with which the value keeps the meaning of the paper."""
    geometric_mean: bool = False
    """Whether its ratio is a geometric mean over the tokens of a sequence."""
    token_advantages: bool = True
    """Whether every token may have an advantage of its own."""
    weighs_engine: bool = False
    """Whether its kernel already weighs a sequence by how likely the engine was to sample it."""
    reads: tuple[str, ...] = ()
    """What its surrogate takes beside log-probs and parameters (`Objective.loss`, extra)."""
    source: str = ""
    """Paper and equation."""

    def __post_init__(self) -> None:
        choose(f"objective {self.name}: aggregation", self.aggregation, AGGREGATIONS)
        choose(f"objective {self.name}: advantage", self.advantage, ADVANTAGES)
        if self.clip is not None:
            choose(f"objective {self.name}: clip", self.clip, ("ratio", "log"))


_SPECS = (
    ObjectiveSpec(
        "gspo",
        "sequence_mean",
        defaults={"clip_low": 3e-4, "clip_high": 4e-4},
        sequence_level=True,
        aggregations=("sequence_mean",),
        geometric_mean=True,
        token_advantages=False,
        source="arXiv 2507.18071 eq 5-7",
    ),
    ObjectiveSpec(
        "gspo_token",
        "sequence_mean",
        defaults={"clip_low": 3e-4, "clip_high": 4e-4},
        sequence_level=True,
        aggregations=("sequence_mean",),
        geometric_mean=True,
        source="arXiv 2507.18071 eq 13-14",
    ),
    ObjectiveSpec(
        "luspo",
        "sequence_sum",
        defaults={"clip_low": 2e-3, "clip_high": 2.5e-3},
        sequence_level=True,
        aggregations=("sequence_sum",),
        geometric_mean=True,
        token_advantages=False,
        source="arXiv 2602.05261; clip of its section 5.1",
    ),
    ObjectiveSpec(
        "grpo",
        "sequence_mean",
        defaults={"clip_low": 0.2, "clip_high": 0.27, "dual_clip": None},
        source="arXiv 2507.18071 eq 2-3; clip of its section 5.1",
    ),
    ObjectiveSpec(
        "dapo",
        "token_mean",
        defaults={"clip_low": 0.2, "clip_high": 0.28},
        source="arXiv 2503.14476",
    ),
    ObjectiveSpec(
        "dr_grpo",
        "constant_length",
        "group_mean",
        defaults={"clip_low": 0.2, "clip_high": 0.2},
        source="arXiv 2503.20783",
    ),
    ObjectiveSpec(
        "cispo",
        "token_mean",
        defaults={"clip_low": 1.0, "clip_high": 4.0},
        source="arXiv 2506.13585",
    ),
    ObjectiveSpec(
        "gmpo",
        "sequence_mean",
        defaults={"clip_low": 0.4, "clip_high": 0.4},
        clip="log",
        aggregations=("sequence_mean",),
        geometric_mean=True,
        token_advantages=False,
        source="arXiv 2507.20673",
    ),
    ObjectiveSpec(
        "sapo",
        "sequence_mean",
        defaults={"tau_positive": 1.0, "tau_negative": 1.05},
        clip=None,
        source="arXiv 2511.20347",
    ),
    ObjectiveSpec(
        "minirl",
        "sequence_sum",
        "group_mean",
        defaults={"clip_low": 0.2, "clip_high": 0.27},
        source="arXiv 2512.01374",
    ),
    ObjectiveSpec(
        "reinforce",
        "sequence_sum",
        "leave_one_out",
        clip=None,
        source="arXiv 2402.14740 (RLOO)",
    ),
    ObjectiveSpec(
        "dppo_tv",
        "constant_length",
        "group_mean",
        defaults={"delta_low": 0.15, "delta_high": 0.15},
        clip=None,
        source="arXiv 2602.04879 (DPPO-Binary-TV)",
    ),
    ObjectiveSpec(
        "dppo_kl",
        "constant_length",
        "group_mean",
        defaults={"delta_low": 0.05, "delta_high": 0.05},
        clip=None,
        source="arXiv 2602.04879 (DPPO-Binary-KL)",
    ),
    ObjectiveSpec(
        "vespo",
        "token_mean",
        defaults={"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0},
        clip=None,
        aggregations=("token_mean", "sequence_sum", "constant_length"),
        token_advantages=False,
        weighs_engine=True,
        source="arXiv 2602.10693 section 3.4",
    ),
    ObjectiveSpec(
        "m2po",
        "sequence_mean",
        defaults={"second_moment": 0.04},
        clip=None,
        reads=("second_moment_cut",),
        source="arXiv 2510.01161 eq 4-5, algorithm 1",
    ),
    ObjectiveSpec(
        "rspo",
        "sequence_mean",
        defaults={"clip_low": 0.4, "clip_high": 0.4, "shift_floor": 0.7},
        clip="log",
        aggregations=("sequence_mean",),
        geometric_mean=True,
        token_advantages=False,
        reads=("router_shift",),
        source="arXiv 2510.23027 (router shift, on GMPO)",
    ),
    ObjectiveSpec(
        "score_centering",
        "sequence_sum",
        "leave_one_out",
        defaults={"candidates": 32, "weight_cap": None},
        clip=None,
        reads=("expected_score",),
        source="arXiv 2609.20807 (score centering, on RLOO)",
    ),
)
OBJECTIVE_SPECS: dict[str, ObjectiveSpec] = {spec.name: spec for spec in _SPECS}
"""The built-in objectives by name."""


# --- parameter rules ---

MOST_CANDIDATES = 128
"""Tokens whose log-probs an engine gives beside each sampled one, at most: 1 KiB a token."""
CLIPS = ("clip_low", "clip_high", "dual_clip")
"""Parameters that only an objective with a clip has."""
POSITIVE = (
    *("tau_positive", "tau_negative", "delta_low", "delta_high", "second_moment"),
    *("k_positive", "k_negative", "lambda_positive", "lambda_negative"),
)
"""Parameters that must be above 0 wherever an objective has them."""


def resolve_params(owner: str, defaults: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` overlaid with `params`. An unknown parameter is refused with the nearest known one."""
    for key in params:
        if key not in defaults and key in CLIPS and not any(name in defaults for name in CLIPS):
            raise ValueError(
                f"{owner} has no parameter {key!r}, because it clips nothing: leave it out, or use an "
                "objective that clips (grpo, dapo, cispo, gspo)"
            )
        if key not in defaults:
            raise ValueError(f"{owner} has no parameter {key!r}; {nearest(key, defaults)}")
    return {**defaults, **params}


def _number(owner: str, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{owner}.{field} must be a finite number: got {value!r}")
    return float(value)


def check_clip(owner: str, clip_low: object, clip_high: object, *, log_space: bool = False) -> None:
    """Both are positive distances (epsilons) from no change, with clip_low <= clip_high unless clip_low is 1.

    With a ratio clip the bounds are 1 - clip_low and 1 + clip_high, so clip_low lies in (0, 1]. In log space
    (gmpo) they are exp(-clip_low) and exp(clip_high). Raises ValueError that names the owner and the field.
    """
    low, high = _number(owner, "clip_low", clip_low), _number(owner, "clip_high", clip_high)
    for name, value in (("clip_low", low), ("clip_high", high)):
        if value <= 0:
            raise ValueError(f"{owner}.{name} must be > 0, a distance from ratio 1: got {value:g}")
    if log_space:
        return
    if low > 1:
        raise ValueError(f"{owner}.clip_low must be <= 1, the ratio is never negative: got {low:g}")
    if 0.5 <= low < 1 < high < 2:
        raise ValueError(
            f"{owner}.clip_low and clip_high are distances, not bounds: got {low:g} and {high:g}; "
            f"for the bounds [{low:g}, {high:g}] give clip_low={1 - low:g}, clip_high={high - 1:g}"
        )
    # No paper clips the lower side wider than the upper one, but 1 is the usual way to turn it off.
    if low > high and low < 1:
        raise ValueError(
            f"{owner}.clip_low must be <= clip_high (or 1, which turns the lower bound off): got {low:g} > "
            f"{high:g}; they look swapped"
        )


def check_params(owner: str, params: Mapping[str, Any], *, clip: str | None) -> None:
    """Range checks of every parameter that the built-in objectives know. ValueError names owner and field."""
    if clip is not None and "clip_low" in params and "clip_high" in params:
        check_clip(owner, params["clip_low"], params["clip_high"], log_space=clip == "log")
    if params.get("dual_clip") is not None:
        dual = _number(owner, "dual_clip", params["dual_clip"])
        floor = 1 + _number(owner, "clip_high", params.get("clip_high", 0.0))
        if dual <= floor:
            raise ValueError(
                f"{owner}.dual_clip must be > 1 + clip_high = {floor:g}: got {dual:g}; usual is 3"
            )
    if "shift_floor" in params and not 0 <= _number(owner, "shift_floor", params["shift_floor"]) <= 1:
        raise ValueError(
            f"{owner}.shift_floor must lie between 0 and 1, as the shift does: got {params['shift_floor']}"
        )
    if "candidates" in params:
        k = _number(owner, "candidates", params["candidates"])
        if k != int(k) or not 1 <= k <= MOST_CANDIDATES:
            raise ValueError(
                f"{owner}.candidates must be a whole number from 1 to {MOST_CANDIDATES}: got "
                f"{params['candidates']!r}"
            )
    cap = params.get("weight_cap")
    if cap is not None and _number(owner, "weight_cap", cap) < 1:
        raise ValueError(
            f"{owner}.weight_cap must be >= 1, the weight of a token on which engine and learner agree: got "
            f"{cap:g}; null puts no weight beside the centring"
        )
    for name in POSITIVE:
        if name in params and _number(owner, name, params[name]) <= 0:
            raise ValueError(f"{owner}.{name} must be > 0: got {params[name]}")


def check_correction(
    name: object, *, low: float | None = None, high: float | None = None
) -> dict[str, float]:
    """The bounds in force of a correction. A bound of None takes its default.

    Raises ValueError for an unknown name, for a bound that the correction does not have, and for a range that
    excludes the ratio 1.
    """
    kind = choose("correction", name, CORRECTIONS)
    owner = f"correction {kind}"
    given = {key: value for key, value in (("low", low), ("high", high)) if value is not None}
    resolved = resolve_params(owner, CORRECTIONS[kind], given)
    values = {key: _number(owner, key, value) for key, value in resolved.items()}
    if values.get("low", 0.0) < 0 or values.get("high", 1.0) <= 0:
        raise ValueError(f"{owner}: low must be >= 0 and high > 0: got {values}")
    if kind == "opsm":  # its bound is a drift in nats, not a ratio
        return values
    if values.get("low", 0.0) > 1 or values.get("high", 1.0) < 1:
        raise ValueError(f"{owner} must accept the ratio 1, so low <= 1 <= high: got {values}")
    return values
