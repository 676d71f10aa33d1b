"""The loss, the advantages, where old log-probs come from, and what guards them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import above, at_least, choose
from gspo_dist.config.selection import SelectionConfig
from gspo_dist.objectives import age_rules, legality, specs
from gspo_dist.objectives.offset import GuardConfig


@dataclass(frozen=True)
class CorrectionConfig:
    """Importance correction of the mismatch between learner and engine (objectives/mismatch.py)."""

    name: str = "none"
    """none | token_truncate | token_mask | sequence_truncate | sequence_mask |
    geometric_reject | geometric_truncate | veto | opsm."""
    low: float | None = None
    """Lower bound (masks, geometric_reject, veto). Null: the default of objectives/specs.py, CORRECTIONS."""
    high: float | None = None
    """Upper bound (truncations, masks, geometric_reject), and opsm's delta. Null: the default, as above."""

    def __post_init__(self) -> None:
        specs.check_correction(self.name, low=self.low, high=self.high)


@dataclass(frozen=True)
class StalenessConfig:
    """What a loss on the engine's log-probs does about tokens of older policies (objectives/staleness.py)."""

    recentre: bool = False
    """Take out of each token's log ratio the mean over the batch's tokens of the same age, always."""
    clip_spreads: float = 0.0
    """Widen the clip to this many sizes (root mean square over sequences) of the log ratio before learning.
    0 leaves the clip as it is."""
    clip_max: float = 0.01
    """The widest clip_high that this may make; clip_low grows by the same factor."""

    def __post_init__(self) -> None:
        at_least("objective.staleness.clip_spreads", self.clip_spreads, 0.0)
        above("objective.staleness.clip_max", self.clip_max, 0.0)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss, the advantages, and where old log-probs come from."""

    name: str = "gspo"
    """gspo | gspo_token | luspo | grpo | dapo | dr_grpo | cispo | gmpo | sapo | minirl | reinforce |
    dppo_tv | dppo_kl | vespo | m2po | rspo | score_centering, or one of your own: package.module:name."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the objective, e.g. {clip_low: 3e-4, clip_high: 4e-4}. Others keep the paper's values."""
    aggregation: str | None = None
    """Only for a function of your own (package.module:name), which has no aggregation yet. Null elsewhere."""
    allow_wide_clip: bool = False
    """Insist on a clip range of GRPO's size for a sequence-level ratio."""
    advantage: str | None = None
    """group_std | group_mean | leave_one_out | batch_std | maxrl | gdpo | none. Null: the objective's own."""
    credit: str = "episode"
    """What the advantage of a completion's tokens is: episode (one number) | position (of each token, from
    what is paid at it and after it) | turn (of each turn of an episode, from what is paid from it on). The
    last two are for objectives with advantages per token, not for gspo. A reward pays at a position by parts
    named NAME@TOKEN, counted from the completion's first token."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """Parts of the reward that advantage=gdpo normalises apart, with weights: {right: 1, shape: 0.1}."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which rollouts of a batch train."""
    kl_coef: float = 0.0
    """Weight of the KL to the frozen starting policy. Above 0 the learner also keeps that reference."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3: how that KL is estimated from log-probs (objectives/kl.py)."""
    old_logprobs: str = "rollout"
    """rollout (the engine's, nothing is recomputed) | recompute (one more forward pass of the learner)."""
    routing_replay: str = "none"
    """none | r2 (the learner records while it recomputes) | r3 (the engine records while it samples)."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What to do when engine log-probs move the sequence ratio off centre."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Importance correction of the mismatch between learner and engine."""
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    """What the loss does about tokens of older policies, beside old_logprobs and correction."""

    def __post_init__(self) -> None:
        choose("objective.old_logprobs", self.old_logprobs, specs.OLD_LOGPROBS)
        choose("objective.routing_replay", self.routing_replay, specs.ROUTING_REPLAY)
        choose("objective.kl_estimator", self.kl_estimator, specs.KL_ESTIMATORS)
        at_least("objective.kl_coef", self.kl_coef, 0.0)
        self._check_credit()
        self._check_penalty()
        if (self.advantage_name == "gdpo") != bool(self.reward_parts):
            raise ValueError(
                "objective.advantage=gdpo normalises the parts of a reward apart, and nothing else reads "
                f"objective.reward_parts: got advantage {self.advantage_name} and {dict(self.reward_parts)}; "
                "give gdpo the parts with their weights, {right: 1, shape: 0.1}, or leave them out"
            )
        legality.check(
            self.name,
            params=self.params,
            old_logprobs=self.old_logprobs,
            routing_replay=self.routing_replay,
            correction=self.correction.name,
            guard_action=self.guard.action,
            aggregation=self.aggregation,
            advantage=self.advantage,
            allow_wide_clip=self.allow_wide_clip,
        )
        age_rules.check(
            self.name,
            self.params,
            old_logprobs=self.old_logprobs,
            guard_action=self.guard.action,
            recentre=self.staleness.recentre,
            clip_spreads=self.staleness.clip_spreads,
            clip_max=self.staleness.clip_max,
            allow_wide_clip=self.allow_wide_clip,
        )

    def _check_credit(self) -> None:
        choose("objective.credit", self.credit, specs.CREDITS)
        if self.credit == "episode":
            return
        spec = specs.OBJECTIVE_SPECS.get(self.name)
        if spec is not None and not spec.token_advantages:
            others = [name for name, one in specs.OBJECTIVE_SPECS.items() if one.token_advantages]
            raise ValueError(
                f"objective.credit={self.credit} gives tokens advantages of their own, and {self.name} has "
                f"one per sequence (its ratio is the sequence's): got {self.name}; use one of "
                f"{', '.join(others)}, or objective.credit=episode"
            )
        known: tuple[str, ...] = ("group_std", "group_mean")
        if self.credit == "turn":
            known += ("leave_one_out", "none")
        if self.advantage_name is not None and self.advantage_name not in known:
            raise ValueError(
                f"objective.credit={self.credit} compares what is paid within a group: got advantage "
                f"{self.advantage_name}; use {' or '.join(known)}"
            )

    def _check_penalty(self) -> None:
        why = {
            "gdpo": "normalises the parts of a reward, among which it is not",
            "maxrl": "divides by the mean reward, so that no reward may fall below 0",
        }.get(self.advantage_name or "")
        if self.selection.overlong_penalty and why:
            raise ValueError(
                "objective.selection.overlong_penalty is taken from the reward of a long completion, and "
                f"objective.advantage={self.advantage_name} {why}: got {self.selection.overlong_penalty}; "
                "set it to 0 and let the reward charge for length, or use another advantage"
            )

    @property
    def candidates(self) -> int:
        """How many of its likeliest tokens the engine gives with every sampled one, for this objective."""
        spec = specs.OBJECTIVE_SPECS.get(self.name)
        if spec is None or "expected_score" not in spec.reads:
            return 0
        return int(specs.resolve_params(spec.name, spec.defaults, self.params)["candidates"])

    @property
    def advantage_name(self) -> str | None:
        """The advantage estimator in force. None: a user's own objective brings its own."""
        spec = specs.OBJECTIVE_SPECS.get(self.name)
        return self.advantage or (spec.advantage if spec else None)
