"""What is legal, and what it means, on tokens of older policies (rollout.steps_ahead above 0).

`check` holds the rules on objective.staleness. `notes` says what a legal combination then means, which a run
names at its start. `format_rules` prints both. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from gspo_dist.objectives.legality import AXES, Combination, table, without_clip
from gspo_dist.objectives.specs import OBJECTIVE_SPECS, WIDE_SEQUENCE_CLIP, resolve_params

RULES = (
    "objective.staleness needs the engine's log-probs: recomputed ones put every ratio at 1 when the update "
    "starts, so that there is nothing to recentre and no spread to follow",
    "objective.staleness.recentre goes without guard_action=recentre: both would take an offset out of the "
    "same log ratios",
    "objective.staleness.recentre needs a clip, which is what an offset moves the ratio away from",
    "objective.staleness.clip_spreads needs a clip on a sequence ratio "
    f"({', '.join(name for name, spec in OBJECTIVE_SPECS.items() if spec.sequence_level)}), the one whose "
    "spread shrinks with the length and grows with the age",
    f"objective.staleness.clip_max lies between clip_high and {WIDE_SEQUENCE_CLIP}, unless "
    "allow_wide_clip=true: a wider clip never binds on a sequence ratio",
)
"""The rules of `check`, in the order in which it asks."""


def check(
    objective: str,
    params: Mapping[str, object],
    *,
    old_logprobs: str,
    guard_action: str,
    recentre: bool,
    clip_spreads: float,
    clip_max: float,
    allow_wide_clip: bool,
) -> None:
    """The rules on objective.staleness. Raises ValueError with the rule, what was got and the way out."""
    if not recentre and not clip_spreads:
        return
    spec = OBJECTIVE_SPECS.get(objective)
    high: object = None
    if spec is not None:
        high = resolve_params(f"objective {objective}", spec.defaults, params).get("clip_high")
    asked = f"recentre={str(recentre).lower()}, clip_spreads={clip_spreads:g}"
    broken = (
        (old_logprobs == "recompute", f"{asked} and old_logprobs=recompute; leave them out"),
        (recentre and guard_action == "recentre", f"{asked} and guard_action=recentre; set that to warn"),
        (recentre and spec is not None and high is None, f"{asked} for {objective}; set recentre=false"),
        (
            clip_spreads > 0 and not (spec is not None and spec.sequence_level),
            f"{asked} for {objective}; set clip_spreads=0",
        ),
        (
            clip_spreads > 0
            and isinstance(high, (int, float))
            and not (high <= clip_max and (clip_max < WIDE_SEQUENCE_CLIP or allow_wide_clip)),
            f"clip_max={clip_max:g} and clip_high={high}; try 0.01",
        ),
    )
    for rule, (breaks, got) in zip(RULES, broken, strict=True):
        if breaks:
            raise ValueError(f"{rule}: got {got}")


@dataclass(frozen=True)
class Note:
    """What a legal combination means where rollouts are begun ahead of their step."""

    name: str
    """What the log calls it."""
    meaning: str
    """What the loss then sees, or does not."""
    holds: Callable[[Combination], bool]
    """Whether it is true of a combination."""


NOTES: tuple[Note, ...] = (
    Note(
        "the clip sees the age",
        "with the engine's log-probs the ratio is to the policy that sampled, so what the policy has moved "
        "since then is clipped before any learning, negative advantages first; recompute puts the clip where "
        "the update starts",
        lambda c: c.old_logprobs == "rollout" and not without_clip(c.objective),
    ),
    Note(
        "the ratio ignores the age",
        "recomputed old log-probs are the policy's at the start of the update, and nothing weighs how likely "
        "that policy was to sample these tokens (metric staleness/ignored); a correction does: "
        "geometric_truncate for a ratio by sequence, token_truncate for one by token",
        lambda c: c.old_logprobs == "recompute" and c.correction == "none",
    ),
    Note(
        "the decoupled objective",
        "the clip stands around the policy at the start of the update, and the weight is that policy's "
        "probability over the sampling one's, mismatch and age together",
        lambda c: c.old_logprobs == "recompute" and c.correction.endswith(("_truncate", "_mask")),
    ),
    Note(
        "sequences are dropped for their age",
        "these corrections weigh nothing and drop what lies too far off, and the bounds that suit a mismatch "
        "are narrow for a policy that has moved",
        lambda c: c.correction in ("geometric_reject", "veto", "opsm"),
    ),
    Note(
        "routes of their own moment",
        "R3 replays the routes of the weights that sampled each token: exact for completions of one version, "
        "and for others not what one policy would have done (metric routing/replay_mixed_fraction)",
        lambda c: c.routing_replay == "r3",
    ),
    Note(
        "the guard rests on fresh tokens",
        "only tokens of the learner's own version, or the probe of a publication, say what the mismatch is",
        lambda c: c.guard_action != "off" and c.old_logprobs == "rollout" and not without_clip(c.objective),
    ),
)
"""In the order in which a run names them."""


def notes(
    objective: str, *, old_logprobs: str, routing_replay: str, correction: str, guard_action: str
) -> list[Note]:
    """What this combination means on older policies' tokens, for a run to say at its start."""
    combination = Combination(objective, old_logprobs, routing_replay, correction, guard_action)
    return [note for note in NOTES if note.holds(combination)]


def format_rules() -> str:
    """The rules and the notes as text."""
    lines = ["Rules of objective.staleness, which is off unless it is set"]
    lines += [f"{number}. {rule}." for number, rule in enumerate(RULES, 1)]
    lines += ["", "What is legal with rollout.steps_ahead=0 is legal above it, and means"]
    lines += [f"* {note.name} ({_where(note)}): {note.meaning}." for note in NOTES]
    return "\n".join(lines)


def _where(note: Note) -> str:
    """The combinations of a note, as the values on each axis that some of them have."""
    rows = [asdict(row.combination) for row in table() if row.rule is None and note.holds(row.combination)]
    parts = []
    for axis, values in AXES.items():
        found = [v for v in values if any(row[axis] == v for row in rows)]
        if len(found) < len(values):
            parts.append(f"{axis} {', '.join(found)}")
    return "; ".join(parts)
