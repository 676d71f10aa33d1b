"""The one table of legal combinations: objective x old_logprobs x routing_replay x correction x guard_action.

`check` refuses a combination with the rule, what was got and the way out. `format_table` prints all of them.
Standard library only. The words:

    old_logprobs   "rollout": the engine's log-probs are the old policy, and nothing has to run.
                   "recompute": the learner runs a forward pass over the batch before the first mini-batch.
    guard_action   what happens when the mismatch moves the mean log ratio off centre. "recentre" subtracts
                   the mean. "recompute" switches old_logprobs for the steps concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product

from gspo_dist.checks import choose
from gspo_dist.objectives.specs import (
    ADVANTAGES,
    AGGREGATIONS,
    CORRECTIONS,
    GUARD_ACTIONS,
    OBJECTIVE_SPECS,
    OLD_LOGPROBS,
    ROUTING_REPLAY,
    WIDE_SEQUENCE_CLIP,
    ObjectiveSpec,
    check_params,
    resolve_params,
)


@dataclass(frozen=True)
class Combination:
    """One choice on every axis."""

    objective: str
    """A name of OBJECTIVE_SPECS, or the import path of a user's own."""
    old_logprobs: str
    """One of OLD_LOGPROBS."""
    routing_replay: str
    """One of ROUTING_REPLAY."""
    correction: str
    """A name of CORRECTIONS."""
    guard_action: str
    """One of GUARD_ACTIONS."""


@dataclass(frozen=True)
class Rule:
    """A rule that some combinations break."""

    name: str
    """What messages call it."""
    reason: str
    """Why the combination means nothing, or not what it says."""
    way_out: str
    """What to set instead."""
    broken: Callable[[Combination], bool]
    """Whether a combination breaks it."""
    fields: tuple[str, ...]
    """The axes that it reads, which the message shows."""


_OWN = ObjectiveSpec("a user's own", "token_mean")
"""What the rules assume of an objective that they do not know: a clip on token ratios, nothing besides."""


def spec_of(objective: str) -> ObjectiveSpec:
    """The spec of a known objective. A user's own, of which only the name is known yet, gets `_OWN`."""
    return OBJECTIVE_SPECS.get(objective, _OWN)


def without_clip(objective: str) -> bool:
    """Whether a known objective has no clip on a ratio: sapo, reinforce, dppo. A user's own: False."""
    return spec_of(objective).clip is None


# --- the rules ---

RULES: tuple[Rule, ...] = (
    Rule(
        "r2 needs recompute",
        "R2 replays the experts that the learner records while it recomputes old_logprobs; with the engine's "
        "log-probs nothing is recorded",
        "set old_logprobs=recompute, or routing_replay=r3 (recorded by the engine)",
        lambda c: c.routing_replay == "r2" and c.old_logprobs == "rollout",
        ("routing_replay", "old_logprobs"),
    ),
    Rule(
        "correction needs recompute",
        "a correction weighs old_logprobs against rollout_logprobs; when they are the same numbers every "
        "weight is 1 and every token is kept (opsm compares the current policy with the engine, so it stays)",
        "set correction=none, or old_logprobs=recompute",
        lambda c: c.correction not in ("none", "opsm") and c.old_logprobs == "rollout",
        ("correction", "old_logprobs"),
    ),
    Rule(
        "guard acts on rollout log-probs",
        "with recomputed old_logprobs the log ratio is zero by construction in the first mini-batch: there "
        "is no offset to take out or to flee from, and a later one is learning",
        "set guard_action=off or warn, or old_logprobs=rollout",
        lambda c: c.guard_action in ("recentre", "recompute") and c.old_logprobs == "recompute",
        ("guard_action", "old_logprobs"),
    ),
    Rule(
        "guard needs a clip",
        "the guard measures the offset in clip widths, and this objective has no clip on a ratio",
        "set guard_action=off or warn",
        lambda c: c.guard_action in ("recentre", "recompute") and without_clip(c.objective),
        ("guard_action", "objective"),
    ),
    Rule(
        "no product weight on a sequence objective",
        "the weight exp(sum) of a sequence shrinks like exp(-KL * length) while the objective's ratio is a "
        "geometric mean: at KL 1.5e-3 and 8,192 tokens it is about 5e-6, and the loss is gone",
        "set correction=geometric_truncate, geometric_reject, token_truncate or token_mask",
        lambda c: (
            c.correction in ("sequence_truncate", "sequence_mask") and spec_of(c.objective).geometric_mean
        ),
        ("correction", "objective"),
    ),
    Rule(
        "one weight on a sequence",
        "the objective's kernel is itself the weight of a sequence by its likelihood, and a second weight "
        "beside it is not the paper's: its ratio is to the engine, which old_logprobs=rollout makes it",
        "set correction=none and old_logprobs=rollout, or a correction that only drops (geometric_reject, "
        "veto, opsm)",
        lambda c: c.correction.endswith(("_truncate", "_mask")) and spec_of(c.objective).weighs_engine,
        ("correction", "objective"),
    ),
    Rule(
        "router shift needs recompute",
        "the old policy's router probabilities are recorded while the learner recomputes old_logprobs, and "
        "an engine gives none",
        "set old_logprobs=recompute",
        lambda c: "router_shift" in spec_of(c.objective).reads and c.old_logprobs == "rollout",
        ("objective", "old_logprobs"),
    ),
    Rule(
        "no weight on a centred score",
        "the mean score that is taken out is that under the engine's distribution as it is; a weight on the "
        "sampled token alone would leave a mean that is not 0",
        "set correction=none and objective.params.weight_cap, whose mean is taken out with it, or a "
        "correction that only drops (geometric_reject, veto, opsm)",
        lambda c: (
            c.correction.endswith(("_truncate", "_mask")) and "expected_score" in spec_of(c.objective).reads
        ),
        ("correction", "objective"),
    ),
)

_AGGREGATION_REASON = (
    "any other aggregation weighs a sequence by its length otherwise, which is not the objective of the paper"
)


def broken_rules(combination: Combination) -> list[Rule]:
    """The rules that this combination breaks, in the order of RULES."""
    return [rule for rule in RULES if rule.broken(combination)]


def check(
    objective: str,
    *,
    params: Mapping[str, object] | None = None,
    old_logprobs: str = "recompute",
    routing_replay: str = "none",
    correction: str = "none",
    guard_action: str = "off",
    aggregation: str | None = None,
    advantage: str | None = None,
    allow_wide_clip: bool = False,
) -> None:
    """Returns when the combination is legal.

    objective: a known name, or a user's import path ("package.module:NAME"), which only the general rules
    bind. params: the objective's parameters, checked by name and range. aggregation, advantage: None means
    its own.
    Raises ValueError with every broken rule, what was got and the way out.
    """
    spec = None if ":" in str(objective) else OBJECTIVE_SPECS[choose("objective", objective, OBJECTIVE_SPECS)]
    combination = Combination(
        objective,
        choose("old_logprobs", old_logprobs, OLD_LOGPROBS),
        choose("routing_replay", routing_replay, ROUTING_REPLAY),
        choose("correction", correction, CORRECTIONS),
        choose("guard_action", guard_action, GUARD_ACTIONS),
    )
    if advantage is not None:
        choose("advantage", advantage, ADVANTAGES)
    problems = [_message(rule, combination) for rule in broken_rules(combination)]
    if problems:
        raise ValueError("\n".join(problems))
    if spec is None:
        return
    resolved = resolve_params(f"objective {objective}", spec.defaults, params or {})
    check_params(f"objective {objective}", resolved, clip=spec.clip)
    if resolved.get("weight_cap") is not None and old_logprobs == "recompute":
        raise ValueError(
            f"{objective}.weight_cap weighs a token by learner against engine, and with recomputed "
            "old_logprobs its ratio is to the learner's own: got weight_cap="
            f"{resolved['weight_cap']:g}, old_logprobs=recompute; set old_logprobs=rollout, or "
            "weight_cap=null"
        )
    check_settings(
        spec,
        aggregation=aggregation,
        clip_low=resolved.get("clip_low"),
        clip_high=resolved.get("clip_high"),
        allow_wide_clip=allow_wide_clip,
    )


def check_settings(
    spec: ObjectiveSpec,
    *,
    aggregation: str | None,
    clip_low: float | None,
    clip_high: float | None,
    allow_wide_clip: bool,
) -> None:
    """The two rules on an objective's own settings. aggregation: None means its own.

    Raises ValueError for an aggregation with another meaning than the paper's, and for a clip of token size
    on a sequence ratio.
    """
    chosen = choose("aggregation", aggregation or spec.aggregation, AGGREGATIONS)
    if chosen not in spec.aggregations:
        raise ValueError(
            f"{spec.name} keeps its aggregation: {_AGGREGATION_REASON}: got aggregation={chosen}; "
            f"set aggregation={' or '.join(spec.aggregations)}"
        )
    widest = max(clip_low or 0.0, clip_high or 0.0)
    if spec.sequence_level and widest >= WIDE_SEQUENCE_CLIP and not allow_wide_clip:
        raise ValueError(
            f"{spec.name} clips a sequence ratio, a geometric mean over the tokens, on which a clip of "
            f"{WIDE_SEQUENCE_CLIP} or more never binds: got clip_low={clip_low}, clip_high={clip_high}; "
            f"use about 3e-4 and 4e-4, or set allow_wide_clip=true to insist"
        )


def _message(rule: Rule, combination: Combination) -> str:
    values = asdict(combination)
    got = ", ".join(f"{name}={values[name]}" for name in rule.fields)
    return f"{rule.name}: {rule.reason}: got {got}; {rule.way_out}"


# --- the table ---

AXES: dict[str, tuple[str, ...]] = {
    "objective": tuple(OBJECTIVE_SPECS),
    "old_logprobs": OLD_LOGPROBS,
    "routing_replay": ROUTING_REPLAY,
    "correction": tuple(CORRECTIONS),
    "guard_action": GUARD_ACTIONS,
}
"""Axis -> its values."""


@dataclass(frozen=True)
class Row:
    """A combination with its verdict."""

    combination: Combination
    """One choice on every axis."""
    rule: Rule | None
    """The first rule that it breaks; None when it is legal."""


def table() -> list[Row]:
    """Every combination of the built-in objectives, in the order of the axes."""
    rows = []
    for values in product(*AXES.values()):
        combination = Combination(*values)
        broken = broken_rules(combination)
        rows.append(Row(combination, broken[0] if broken else None))
    return rows


Box = dict[str, tuple[str, ...]]
"""A tuple of values on each axis: all combinations of them."""


def collapsed() -> list[tuple[Box, Rule | None]]:
    """The table as few boxes with one verdict each, which do not overlap and together cover it exactly.

    Example: three combinations that differ only in guard_action and are all legal become one box with three
    values on that axis.
    """
    boxes: list[tuple[Box, Rule | None]] = [
        ({axis: (value,) for axis, value in asdict(row.combination).items()}, row.rule) for row in table()
    ]
    # One pass per axis joins the boxes that agree on all the others.
    for axis in ("guard_action", "correction", "routing_replay", "old_logprobs", "objective"):
        merged: dict[tuple[object, ...], tuple[Box, Rule | None]] = {}
        for box, rule in boxes:
            rest = tuple(values for name, values in box.items() if name != axis)
            key = (rest, rule.name if rule else None)
            before = merged[key][0][axis] if key in merged else ()
            merged[key] = ({**box, axis: before + box[axis]}, rule)
        boxes = list(merged.values())
    return boxes


def format_table() -> str:
    """The rules and the collapsed table as text; "any" stands for every value of the axis."""
    lines = ["Rules"]
    for number, rule in enumerate(RULES, 1):
        lines.append(f"{number}. {rule.name}: {rule.reason}. Way out: {rule.way_out}.")
    own = [spec.aggregations for spec in OBJECTIVE_SPECS.values() if spec.aggregations != AGGREGATIONS]
    kept = [
        f"{', '.join(name for name, spec in OBJECTIVE_SPECS.items() if spec.aggregations == some)} with "
        f"{' or '.join(some)}"
        for some in dict.fromkeys(own)
    ]
    lines.append(f"{len(RULES) + 1}. Aggregations are kept: {'; '.join(kept)}: {_AGGREGATION_REASON}.")
    ratio = ", ".join(name for name, spec in OBJECTIVE_SPECS.items() if spec.sequence_level)
    lines.append(
        f"{len(RULES) + 2}. {ratio}: clips below {WIDE_SEQUENCE_CLIP}, unless allow_wide_clip=true: a wider "
        f"clip never binds on a sequence ratio."
    )
    lines += ["", f"| {' | '.join(AXES)} | verdict |", "|---" * (len(AXES) + 1) + "|"]
    for box, broken in sorted(collapsed(), key=lambda item: RULES.index(item[1]) + 1 if item[1] else 0):
        cells = ["any" if set(box[axis]) == set(AXES[axis]) else ", ".join(box[axis]) for axis in AXES]
        verdict = "legal" if broken is None else f"refused: rule {RULES.index(broken) + 1}"
        lines.append(f"| {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)
