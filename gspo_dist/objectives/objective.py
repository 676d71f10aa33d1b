"""The loss that a learner calls (a surrogate, its aggregation, the KL term), and the objectives by name."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gspo_dist.checks import choose
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives import legality, losses
from gspo_dist.objectives.aggregate import AGGREGATE, Denominators, Segments
from gspo_dist.objectives.kl import KL
from gspo_dist.objectives.mismatch import Correction
from gspo_dist.objectives.offset import Clip
from gspo_dist.objectives.specs import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    OBJECTIVE_SPECS,
    ObjectiveSpec,
    check_params,
    resolve_params,
)
from gspo_dist.objectives.surrogate import LOG_RATIO_LIMIT, Surrogate


@dataclass(frozen=True, eq=False)
class ObjectiveResult:
    """What `Objective.loss` returns."""

    loss: Tensor
    """This call's share of the mini-batch loss: a scalar to call backward on."""
    stats: dict[str, Stat]
    """What the loss saw, by metric name, to be merged over micro-batches and ranks."""


@dataclass(frozen=True)
class Objective:
    """A surrogate with what is fixed about it, its parameters and its KL term.

    Raises ValueError for an unknown parameter or estimator, and for a KL coefficient below 0.
    """

    spec: ObjectiveSpec
    """Name, aggregation, advantage estimator, default parameters and kind of clip."""
    surrogate: Callable[..., Surrogate]
    """A function with the signature of those in `losses`. Its keyword-only arguments are the parameters."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that differ from the defaults, normally given through `get_objective`."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy. 0 leaves the term out."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3 (`kl`)."""

    def __post_init__(self) -> None:
        owner = f"objective {self.spec.name}"
        choose(f"{owner}: kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not (isinstance(self.kl_coef, (int, float)) and 0 <= self.kl_coef < math.inf):
            raise ValueError(f"{owner}: kl_coef must be a finite number >= 0: got {self.kl_coef!r}")
        resolve_params(owner, self.spec.defaults, self.params)

    @property
    def resolved(self) -> dict[str, Any]:
        """The parameters in force."""
        return {**self.spec.defaults, **self.params}

    @property
    def clip(self) -> Clip | None:
        """The clip in force, or None when the objective has no hard clip."""
        low, high = self.resolved.get("clip_low"), self.resolved.get("clip_high")
        if self.spec.clip is None or low is None or high is None:
            return None
        return Clip(low, high, log_space=self.spec.clip == "log")

    def loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        segments: Segments,
        denominators: Denominators,
        *,
        ref_logprobs: Tensor | None = None,
        correction: Correction | None = None,
        offset: float | Tensor = 0.0,
        extra: Mapping[str, float | Tensor] | None = None,
    ) -> ObjectiveResult:
        """This call's share of aggregate(weights * keep * surrogate) + kl_coef * aggregate(KL).

        All tensors are [N], and log-probs are in nats. Only logprobs gets a gradient. The correction gives
        weights and keep. A token that is not kept has no policy loss, but still counts in the denominators.
        The offset, in nats, is subtracted from every log ratio: one number, or [N], one for each token. The
        KL term against ref_logprobs is neither weighted nor masked. extra: what the surrogate reads besides
        (`spec.reads`): numbers, or tensors [N].
        Raises ValueError naming the argument that has a wrong shape or type, or a number that is not finite,
        and for an extra that is missing or that nobody reads.
        """
        old, advantages = old_logprobs.detach(), advantages.detach()
        _check_inputs(segments, logprobs, old, advantages, ref_logprobs, correction, offset)
        if self.kl_coef > 0 and ref_logprobs is None:
            raise ValueError(
                f"objective {self.spec.name}: ref_logprobs are needed with kl_coef={self.kl_coef}: got None"
            )
        # To subtract from the log ratio is to add to the old log-probs. 0 makes no copy of them.
        centred = old + offset if isinstance(offset, Tensor) or offset else old
        read = dict(extra or {})
        if set(read) != set(self.spec.reads):
            raise ValueError(
                f"objective {self.spec.name} reads {sorted(self.spec.reads)} beside log-probs: got "
                f"{sorted(read)}; a learner fills them in from its LossSpec and its batch"
            )
        surrogate = self.surrogate(logprobs, centred, advantages, segments, **self.resolved, **read)
        per_token = surrogate.loss
        if correction is not None:
            per_token = per_token * correction.weights.detach().to(per_token.dtype)
            # masked_fill and not a product: 0 * inf would be nan.
            per_token = per_token.masked_fill(~correction.keep, 0.0)
        aggregate = AGGREGATE[self.spec.aggregation]
        policy_loss = loss = aggregate(per_token, segments, denominators)
        stats = _stats(surrogate, logprobs.detach() - old, advantages, segments, correction, offset)
        if ref_logprobs is not None:
            kl = KL[self.kl_estimator](logprobs, ref_logprobs.detach())
            stats["objective/kl_reference"] = Stat.mean(kl)
            if self.kl_coef > 0:
                kl_loss = self.kl_coef * aggregate(kl, segments, denominators)
                loss = policy_loss + kl_loss
                stats["objective/kl_loss"] = Stat.sum(kl_loss)
        stats["objective/policy_loss"], stats["objective/loss"] = Stat.sum(policy_loss), Stat.sum(loss)
        return ObjectiveResult(loss, stats)


def _check_inputs(
    segments: Segments,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    ref: Tensor | None,
    correction: Correction | None,
    offset: float | Tensor,
) -> None:
    """Shapes, types and finiteness, with one synchronisation of the device."""
    numbers = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages}
    if ref is not None:
        numbers["ref_logprobs"] = ref
    if correction is not None:
        numbers["weights"] = correction.weights
    for name, x in numbers.items():
        segments.check(x, name)
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64, sums in less lose the clip width: got {x.dtype}"
            )
    if correction is not None:
        segments.check(correction.keep, "keep")
        if correction.keep.dtype != torch.bool:
            raise ValueError(f"keep must be bool, True = counts: got {correction.keep.dtype}")
    if isinstance(offset, Tensor):
        segments.check(offset, "offset")
        numbers["offset"] = offset
    elif not math.isfinite(offset):
        raise ValueError(f"offset must be a finite number: got {offset}")
    # A sum is finite only if all its terms are, and costs a fortieth of testing each. Where one is not, the
    # exact test below finds the token.
    sums = torch.stack([x.detach().sum().double() for x in numbers.values()]).isfinite().tolist()
    for name, finite in zip(numbers, sums, strict=True):
        broken = [] if finite else (~torch.isfinite(numbers[name])).nonzero().flatten().tolist()
        if broken:
            at = broken[0]
            raise ValueError(
                f"{name} must be finite: got {float(numbers[name][at])} at token {at} of sequence "
                f"{int(segments.ids[at])}; -inf means that the token was cut away by top-k or top-p"
            )


@torch.no_grad()
def _stats(
    surrogate: Surrogate,
    log_ratio: Tensor,
    advantages: Tensor,
    segments: Segments,
    correction: Correction | None,
    offset: float | Tensor,
) -> dict[str, Stat]:
    """What the loss saw. log_ratio [N] is raw: the offset is not taken out.

    ratio_* are of the ratio that was clipped. sequence_* are means over sequences of the mean over their
    tokens. A rank that holds a part of a sequence counts that part, so the sums are exact under any layout.
    """
    clipped = surrogate.clipped_low | surrogate.clipped_high
    positive, negative = advantages > 0, advantages < 0
    share = segments.expand(1.0 / segments.lengths.to(log_ratio.dtype))
    sequence_log_ratio = segments.expand(segments.mean(log_ratio))
    stats = {
        "objective/clip_fraction": Stat.mean(clipped),
        "objective/clip_fraction_low": Stat.mean(surrogate.clipped_low),
        "objective/clip_fraction_high": Stat.mean(surrogate.clipped_high),
        "objective/clip_fraction_positive": Stat.mean(clipped, positive),
        "objective/clip_fraction_negative": Stat.mean(clipped, negative),
        "objective/sequence_clip_fraction": Stat.mean(clipped, share),
        "objective/sequence_clip_fraction_positive": Stat.mean(clipped, share * positive),
        "objective/sequence_clip_fraction_negative": Stat.mean(clipped, share * negative),
        # Tokens are samples of the old policy, so E[-log_ratio] is KL(old || current).
        "objective/approx_kl_k1": Stat.mean(-log_ratio),
        "objective/approx_kl_k3": Stat.mean(log_ratio.clamp(max=LOG_RATIO_LIMIT).expm1() - log_ratio),
        "objective/ratio_mean": Stat.mean(surrogate.ratio),
        "objective/ratio_min": Stat.min(surrogate.ratio),
        "objective/ratio_max": Stat.max(surrogate.ratio),
        "objective/sequence_log_ratio_mean": Stat.mean(sequence_log_ratio, share),
        # float64: the variance is a difference of nearly equal moments.
        "objective/sequence_log_ratio_square": Stat.mean(sequence_log_ratio.double().square(), share),
        "objective/advantage_mean": Stat.mean(advantages),
        "objective/tokens": Stat.sum(torch.ones_like(log_ratio)),
        "objective/sequences": Stat.sum(share),
        "objective/offset": Stat.mean(torch.zeros_like(log_ratio) + offset),
        "values/sequence_log_ratio": Stat.concat(segments.mean(log_ratio)),
    }
    if correction is not None:
        stats["objective/correction_weight_mean"] = Stat.mean(correction.weights)
        stats["objective/correction_keep_fraction"] = Stat.mean(correction.keep)
    return stats


OBJECTIVES: dict[str, Objective] = {
    name: Objective(spec, getattr(losses, name)) for name, spec in OBJECTIVE_SPECS.items()
}
"""The built-in objectives: each name of `specs` bound to the function of that name in `losses`."""


def get_objective(
    name: str,
    *,
    aggregation: str | None = None,
    advantage: str | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    allow_wide_clip: bool = False,
    **params: object,
) -> Objective:
    """The objective `name`, bound to `params` and checked before anything heavy starts.

    name: one of OBJECTIVES, or the import path "package.module:NAME" of a user's own. That is an Objective,
    or a function with the signature of those in `losses`. A function needs `aggregation` too, and its
    keyword-only arguments are the parameters.
    aggregation, advantage: None keeps the objective's own.
    Raises ValueError for an unknown name or parameter, a clip that is negative or the wrong way round, and an
    aggregation that changes the objective's meaning. A token-sized clip on a sequence ratio is refused too,
    unless allow_wide_clip is set.
    """
    if ":" in str(name):
        base = _import_objective(name, aggregation)
    else:
        base = OBJECTIVES[choose("objective", name, OBJECTIVES)]
    owner = f"objective {name}"
    resolved = resolve_params(owner, base.spec.defaults, {**base.params, **params})
    check_params(owner, resolved, clip=base.spec.clip)
    legality.check_settings(
        base.spec,
        aggregation=aggregation,
        clip_low=resolved.get("clip_low"),
        clip_high=resolved.get("clip_high"),
        allow_wide_clip=allow_wide_clip,
    )
    spec = replace(
        base.spec,
        aggregation=aggregation or base.spec.aggregation,
        advantage=advantage or base.spec.advantage,
    )
    return replace(base, spec=spec, params=resolved, kl_coef=kl_coef, kl_estimator=kl_estimator)


def _import_objective(path: str, aggregation: str | None) -> Objective:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"objective must import as package.module:NAME: got {path!r} ({error})") from error
    if isinstance(found, Objective):
        return found
    keywords = [p for p in _parameters(path, found) if p.kind is p.KEYWORD_ONLY]
    if aggregation is None:
        raise ValueError(
            f"objective {path} is a bare function and owns no aggregation: give aggregation="
            f"{'|'.join(AGGREGATIONS)}, or name an Objective"
        )
    for parameter in keywords:
        if parameter.default is parameter.empty:
            raise ValueError(f"objective {path}: parameter {parameter.name!r} needs a default")
    defaults = {parameter.name: parameter.default for parameter in keywords}
    return Objective(ObjectiveSpec(path, aggregation, defaults=defaults), found)


def _parameters(path: str, found: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(found).parameters.values())
    except TypeError as error:
        raise ValueError(f"objective {path} must be an Objective or a function: got {found!r}") from error
